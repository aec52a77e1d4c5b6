"""Every engine delivers the same samples in the same order, with any ranks, threads, batch size and restarts."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import ENGINES, open_loader
from pipeline.errors import UserError
from pipeline.loader import Loader
from pipeline.pixels.normalize import Normalization
from pipeline.plan import sampling
from pipeline.plan.geometry import CentreCrop, PaddedCrop, RandomResizedCrop, ScaleJitter, TenCrop, WholeImage
from pipeline.spec import LoaderSpec
from tests.pipeline.contract.conftest import WITHOUT
from tests.pipeline.contract.helpers import differences, ids, spec_for


@pytest.mark.slow
def test_training_follows_the_plan(small: Path, engine: str) -> None:
    loader = open_loader(spec_for(small, engine, seed=3))
    assert len(loader) == 7
    for epoch in range(3):
        assert loader.epoch == epoch
        assert ids(loader) == sampling.order(3, epoch, np.arange(56), 60).tolist()
    loader.close()


def test_the_dropped_samples_differ_from_epoch_to_epoch(small: Path, engine: str) -> None:
    loader = open_loader(spec_for(small, engine))
    dropped = [frozenset(range(60)) - set(ids(loader)) for _ in range(4)]
    assert all(len(each) == 4 for each in dropped)
    assert len(set(dropped)) > 1
    loader.close()


@pytest.mark.parametrize(
    ("world_size", "batch_size", "threads", "order"),
    [
        (1, 1, 3, "full"),
        (1, 64, 1, "blocks"),
        (2, 5, 3, "full"),
        (3, 8, 1, "blocks"),
        (3, 64, 3, "sequential"),
        (4, 1, 1, "full"),
        (8, 5, 3, "blocks"),
    ],
)
def test_every_sample_comes_once(small: Path, engine: str, world_size: int, batch_size: int, threads: int, order: str) -> None:
    spec = spec_for(
        small, engine, training=False, batch_size=batch_size, world_size=world_size, threads=threads, order=order, block_shards=3
    )
    assert count(spec) == Counter(range(60))


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("geometry", [CentreCrop(36), TenCrop(36), WholeImage(40, mirrored=True)])
def test_evaluation_counts_every_sample_once(
    small: Path, engine: str, geometry: CentreCrop | TenCrop | WholeImage, world_size: int
) -> None:
    spec = spec_for(small, engine, world_size=world_size).evaluation(batch_size=5, geometry=geometry)
    assert count(spec) == Counter(range(21))


def count(spec: LoaderSpec) -> Counter[int]:
    """How often each sample occurs in an epoch, over all ranks."""
    seen: Counter[int] = Counter()
    for rank in range(spec.world_size):
        loader = open_loader(replace(spec, rank=rank))
        for batch in loader:
            assert batch.labels.tolist() == loader.shards.samples["label"][batch.ids].tolist()
            assert len(batch.images) == len(batch.ids) * loader.crops
            seen.update(batch.ids.tolist())
        loader.close()
    return seen


@pytest.mark.parametrize("order", ["full", "blocks"])
def test_the_global_sequence_does_not_depend_on_ranks_and_threads(small: Path, engine: str, order: str) -> None:
    spec = spec_for(small, engine, order=order, block_shards=3)
    whole = list(open_loader(spec))
    parts = [list(open_loader(replace(spec, world_size=2, rank=rank, threads=3))) for rank in range(2)]
    for step, batch in enumerate(whole):
        assert batch.ids.tolist() == [sample for part in parts for sample in part[step].ids.tolist()]
        assert torch.equal(batch.images, torch.cat([part[step].images for part in parts]))
        assert torch.equal(batch.labels, torch.cat([part[step].labels for part in parts]))


@pytest.mark.parametrize(
    ("stop", "changes"),
    [
        (0, {}),
        (1, {"prefetch": 1}),
        (3, {"prefetch": 4}),
        (3, {"order": "blocks", "block_shards": 3}),
        (6, {"geometry": RandomResizedCrop()}),
        (2, {"geometry": PaddedCrop()}),
        (7, {}),
    ],
    ids=str,
)
def test_a_saved_position_gives_the_next_batch(small: Path, engine: str, stop: int, changes: dict[str, object]) -> None:
    spec = spec_for(small, engine, **changes)
    loader = open_loader(spec)
    ids(loader)
    batches = iter(loader)
    for _ in range(stop):
        next(batches)
    state = loader.state_dict()
    expected = list(batches)  # the rest of epoch 1
    resumed = open_loader(replace(spec, threads=3))
    resumed.load_state_dict(state)
    assert (resumed.epoch, resumed.consumed) == (1, stop * 8)
    found = list(resumed)
    assert len(found) == 7 - stop
    for actual, reference in zip(found, expected, strict=True):
        assert np.array_equal(actual.ids, reference.ids)
        assert torch.equal(actual.images, reference.images)
    assert resumed.epoch == 2
    loader.close()
    resumed.close()


def test_resuming_with_other_ranks_and_batch_size_continues_at_the_sample(small: Path, engine: str) -> None:
    loader = open_loader(spec_for(small, engine))
    order = sampling.order(0, 0, np.arange(60), 60).tolist()
    batches = iter(loader)
    next(batches)
    next(batches)
    state = loader.state_dict()
    loader.close()
    parts = []
    for rank in range(2):
        resumed = open_loader(spec_for(small, engine, world_size=2, rank=rank, batch_size=4))
        resumed.load_state_dict(state)
        parts.append([batch.ids.tolist() for batch in resumed])
        resumed.close()
    assert [sample for pair in zip(*parts, strict=True) for part in pair for sample in part] == order[16:]


def test_another_engine_continues_with_the_same_samples_and_draws(small: Path, engine: str) -> None:
    loader = open_loader(spec_for(small, engine))
    next(iter(loader))
    state = loader.state_dict()
    loader.close()
    for name in ENGINES:
        if name not in WITHOUT:
            other = open_loader(spec_for(small, name))
            other.load_state_dict(state)
            plan = loader.plan(next(loader.batch_ranges(0, 8)))  # this engine's draws
            difference = differences(other, plan, next(iter(other)))
            assert difference.mean() <= 1
            other.close()


def test_seeking_drops_batches_in_progress(small: Path, engine: str) -> None:
    loader = open_loader(spec_for(small, engine))
    first = next(iter(loader))
    loader.seek(5, 16)
    assert ids(loader) == sampling.order(0, 5, np.arange(16, 56), 60).tolist()
    loader.seek(0, 0)
    again = next(iter(loader))
    assert torch.equal(first.images, again.images)
    with pytest.raises(ValueError, match="no position"):
        loader.seek(0, 57)
    loader.close()


def test_image_sizes_follow_the_spec(small: Path, engine: str) -> None:
    """Crops of 32 equal those of a spec with that size alone. Smaller ones are drawn in proportion."""
    spec = spec_for(small, engine, image_size=((0, 16), (1, 24), (3, 32)))
    loader = open_loader(spec)
    sizes = [{tuple(batch.images.shape[2:]) for batch in loader} for _ in range(4)]
    assert sizes == [{(16, 16)}, {(24, 24)}, {(24, 24)}, {(32, 32)}]
    loader.seek(0, 0)
    batch_range = next(loader.batch_ranges(0, 0))
    assert differences(loader, loader.plan(batch_range), next(iter(loader))).mean() <= 1
    plain = open_loader(spec_for(small, engine))
    for one in (loader, plain):
        one.seek(3, 0)
    assert torch.equal(next(iter(loader)).images, next(iter(plain)).images)
    assert next(iter(open_loader(spec.evaluation()))).images.shape[2:] == (32, 32)
    loader.close()
    plain.close()


def test_whole_images_come_in_batches_of_one_size(small: Path, engine: str) -> None:
    loader = open_loader(spec_for(small, engine, batch_size=4).evaluation(geometry=WholeImage(40)))
    ranges = list(loader.batch_ranges(0, 0))
    assert len(loader) == len(ranges)
    shapes = [tuple(batch.images.shape[2:]) for batch in loader]
    assert shapes == [loader.plan(batch_range).size for batch_range in ranges]
    assert len(set(shapes)) > 3
    assert all(min(shape) == 40 for shape in shapes)
    loader.close()


def test_batches_kept_by_the_caller_do_not_change(small: Path, engine: str) -> None:
    loader = open_loader(spec_for(small, engine))
    kept, copies = [], []
    for _ in range(5):
        for batch in loader:
            kept.append(batch.images)
            copies.append(batch.images.clone())
    loader.close()
    assert all(torch.equal(one, other) for one, other in zip(kept, copies, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8])
def test_batches_are_channels_last_in_the_specs_dtype(small: Path, engine: str, dtype: torch.dtype) -> None:
    batch = next(iter(open_loader(spec_for(small, engine, dtype=dtype))))
    plain = spec_for(small, engine, alpha_std=0.0, normalization=Normalization.of([0, 0, 0]))
    exact = next(iter(open_loader(plain if dtype == torch.uint8 else spec_for(small, engine))))
    assert batch.images.dtype == dtype
    assert batch.images.shape == (8, 3, 32, 32)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.labels.dtype == torch.int64
    # half a step at 128..256, and an earlier rounding
    tolerance = {torch.float32: 0.0, torch.float16: 0.07, torch.bfloat16: 0.6, torch.uint8: 0.0}[dtype]
    assert (batch.images.float() - exact.images).abs().max() <= tolerance


def test_normalization_divides_by_the_standard_deviation(small: Path, engine: str) -> None:
    plain = next(iter(open_loader(spec_for(small, engine, normalization=Normalization.of([10, 20, 30])))))
    scaled = next(iter(open_loader(spec_for(small, engine, normalization=Normalization.of([10, 20, 30], [2, 4, 5])))))
    assert torch.allclose(scaled.images * torch.tensor([2.0, 4, 5])[:, None, None], plain.images, atol=1e-4)


def test_a_position_in_other_data_is_refused(small: Path, engine: str) -> None:
    state = open_loader(spec_for(small, engine)).state_dict()
    for changes in (
        {"seed": 1},
        {"image_size": 36},
        {"image_size": ((0, 16), (6, 32))},
        {"geometry": ScaleJitter(36, 69)},
        {"geometry": RandomResizedCrop()},
        {"geometry": PaddedCrop()},
        {"order": "blocks"},
        {"normalization": "channel"},
        {"split": "val"},
        {"alpha_std": 0.0},
        {"training": False},
    ):
        with pytest.raises(UserError, match="other data"):
            open_loader(spec_for(small, engine, **changes)).load_state_dict(state)
    blocks = open_loader(spec_for(small, engine, order="blocks")).state_dict()
    with pytest.raises(UserError, match="other data"):
        open_loader(spec_for(small, engine, order="blocks", block_shards=3)).load_state_dict(blocks)
    same = {"batch_size": 4, "threads": 2, "prefetch": 1, "dtype": torch.float16, "world_size": 2, "rank": 1, "block_shards": 3}
    open_loader(spec_for(small, engine, **same)).load_state_dict(state)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"geometry": ScaleJitter(20, 68)}, "image size"),
        ({"geometry": ScaleJitter(68, 36)}, "low <= high"),
        ({"geometry": CentreCrop(20)}, "at least the image size"),
        ({"geometry": RandomResizedCrop(area=(0.5, 1.5))}, "area 0.5 1.5"),
        ({"geometry": RandomResizedCrop(aspect=(2, 1))}, "aspect 2 1"),
        ({"geometry": WholeImage(40)}, "for evaluation"),
        ({"geometry": PaddedCrop(32)}, "padding 32: needs 0 <= padding < image size"),
        ({"image_size": 0}, "image_size"),
        ({"image_size": ((1, 32),)}, "from epoch 0 on"),
        ({"image_size": ((0, 32), (0, 16))}, "ascending"),
        ({"order": "random"}, "full or blocks or sequential, not 'random'"),
        ({"corrupt": "ignore"}, "replace or stop, not 'ignore'"),
        ({"batch_size": 61}, "fewer than one batch"),
        ({"batch_size": 9, "world_size": 2}, "multiple of the number of processes"),
        ({"rank": 1}, "rank"),
        ({"seed": -1}, "seed"),
        ({"threads": 0}, "threads"),
        ({"block_shards": 0}, "block_shards"),
        ({"hw_decoder_load": 1.5}, "hw_decoder_load"),
        ({"dtype": torch.float64}, "float64"),
        ({"normalization": "median"}, "median"),
        ({"split": "test"}, "no split"),
        ({"device": "cuda:7"}, "no such CUDA GPU"),
    ],
    ids=str,
)
def test_a_bad_spec_is_refused_in_one_line(small: Path, engine: str, changes: dict[str, object], words: str) -> None:
    if changes.get("device") and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match=words) as caught:
        open_loader(spec_for(small, engine, **changes))
    assert "\n" not in str(caught.value)


def test_two_iterations_at_the_same_time_are_refused(small: Path, engine: str) -> None:
    loader: Loader = open_loader(spec_for(small, engine))
    first, second = iter(loader), iter(loader)
    next(first)
    with pytest.raises(RuntimeError, match="open a loader for each"):
        next(second), next(second), next(first)
    loader.close()
