"""The contract that every engine keeps: samples, order, ranks, resuming. Pixels are in engines/test_dali.py."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import ENGINES, open_loader, plan
from pipeline.augment import Normalization
from pipeline.errors import UserError
from pipeline.loader import Loader, LoaderSpec

pytestmark = pytest.mark.parametrize("engine", list(ENGINES))


def spec_for(data: Path, engine: str, **changes: object) -> LoaderSpec:
    spec = LoaderSpec(data, batch_size=8, image_size=32, scale=(36, 68), eval_short=36, threads=1, engine=engine)
    return replace(spec, **changes)  # type: ignore[arg-type]


def ids(loader: Loader) -> list[int]:
    """The ids of the rest of an epoch, in order."""
    return [int(index) for batch in loader for index in batch.ids]


def test_training_follows_the_plan(small_shards: Path, engine: str) -> None:
    loader = open_loader(spec_for(small_shards, engine, seed=3))
    assert len(loader) == 7
    for epoch in range(3):
        assert loader.epoch == epoch
        assert ids(loader) == plan.order(3, epoch, np.arange(56), 60).tolist()


def test_the_dropped_samples_differ_from_epoch_to_epoch(small_shards: Path, engine: str) -> None:
    loader = open_loader(spec_for(small_shards, engine))
    dropped = [frozenset(range(60)) - set(ids(loader)) for _ in range(4)]
    assert all(len(each) == 4 for each in dropped)
    assert len(set(dropped)) > 1


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("batch_size", [1, 5, 8, 64])
def test_evaluation_counts_every_sample_once(small_shards: Path, engine: str, world_size: int, batch_size: int) -> None:
    seen: Counter[int] = Counter()
    for rank in range(world_size):
        spec = spec_for(small_shards, engine, batch_size=batch_size, world_size=world_size, rank=rank)
        loader = open_loader(spec.evaluation())
        for batch in loader:
            assert batch.labels.tolist() == loader.shards.samples["label"][batch.ids].tolist()
            assert len(batch.images) == len(batch.ids)
            seen.update(batch.ids.tolist())
        loader.close()
    assert seen == Counter(range(21))


def test_the_global_sequence_does_not_depend_on_the_ranks(small_shards: Path, engine: str) -> None:
    whole = list(open_loader(spec_for(small_shards, engine)))
    parts = [list(open_loader(spec_for(small_shards, engine, world_size=4, rank=rank))) for rank in range(4)]
    for step, batch in enumerate(whole):
        assert batch.ids.tolist() == [index for part in parts for index in part[step].ids.tolist()]
        assert torch.equal(batch.images, torch.cat([part[step].images for part in parts]))
        assert torch.equal(batch.labels, torch.cat([part[step].labels for part in parts]))


@pytest.mark.parametrize("prefetch", [1, 2, 4])
@pytest.mark.parametrize("stop", [0, 1, 3, 6, 7])
def test_a_saved_place_gives_the_very_next_batch(small_shards: Path, engine: str, stop: int, prefetch: int) -> None:
    spec = spec_for(small_shards, engine, prefetch=prefetch)
    loader = open_loader(spec)
    ids(loader)
    batches = iter(loader)
    for _ in range(stop):
        next(batches)
    state = loader.state_dict()
    expected = list(batches)  # the rest of epoch 1
    resumed = open_loader(replace(spec, threads=2))
    resumed.load_state_dict(state)
    assert (resumed.epoch, resumed.consumed) == (1, stop * 8)
    found = list(resumed)
    assert len(found) == 7 - stop
    for ours, theirs in zip(found, expected, strict=True):
        assert np.array_equal(ours.ids, theirs.ids)
        assert torch.equal(ours.images, theirs.images)
    assert resumed.epoch == 2


def test_resuming_with_other_ranks_and_batch_size_goes_on_at_the_sample(small_shards: Path, engine: str) -> None:
    loader = open_loader(spec_for(small_shards, engine))
    order = plan.order(0, 0, np.arange(60), 60).tolist()
    batches = iter(loader)
    next(batches)
    next(batches)
    state = loader.state_dict()
    parts = []
    for rank in range(2):
        resumed = open_loader(spec_for(small_shards, engine, world_size=2, rank=rank, batch_size=4))
        resumed.load_state_dict(state)
        parts.append([batch.ids.tolist() for batch in resumed])
    assert [index for pair in zip(*parts, strict=True) for part in pair for index in part] == order[16:]


def test_seeking_drops_what_was_in_flight(small_shards: Path, engine: str) -> None:
    loader = open_loader(spec_for(small_shards, engine))
    first = next(iter(loader))
    loader.seek(5, 16)
    assert ids(loader) == plan.order(0, 5, np.arange(16, 56), 60).tolist()
    loader.seek(0, 0)
    again = next(iter(loader))
    assert torch.equal(first.images, again.images)
    with pytest.raises(ValueError, match="no place"):
        loader.seek(0, 57)


def test_batches_kept_by_the_caller_stay_as_they_were(small_shards: Path, engine: str) -> None:
    loader = open_loader(spec_for(small_shards, engine))
    kept, copies = [], []
    for _ in range(5):
        for batch in loader:
            kept.append(batch.images)
            copies.append(batch.images.clone())
    assert all(torch.equal(one, other) for one, other in zip(kept, copies, strict=True))


def test_a_place_in_other_data_is_refused(small_shards: Path, engine: str) -> None:
    state = open_loader(spec_for(small_shards, engine)).state_dict()
    for changes in (
        {"seed": 1},
        {"image_size": 36},
        {"scale": (36, 69)},
        {"normalization": "channel"},
        {"split": "val"},
        {"alpha_std": 0.0},
    ):
        with pytest.raises(UserError, match="other data"):
            open_loader(spec_for(small_shards, engine, **changes)).load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_batches_are_channels_last_in_the_training_dtype(small_shards: Path, engine: str, dtype: torch.dtype) -> None:
    batch = next(iter(open_loader(spec_for(small_shards, engine, dtype=dtype))))
    exact = next(iter(open_loader(spec_for(small_shards, engine))))
    assert batch.images.dtype == dtype
    assert batch.images.shape == (8, 3, 32, 32)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.labels.dtype == torch.int64
    tolerance = {torch.float32: 0.0, torch.float16: 0.07, torch.bfloat16: 0.6}[
        dtype
    ]  # half a step at 128..256, and a rounding before
    assert (batch.images.float() - exact.images).abs().max() <= tolerance


def test_a_standard_deviation_divides(small_shards: Path, engine: str) -> None:
    plain = next(iter(open_loader(spec_for(small_shards, engine, normalization=Normalization.of([10, 20, 30])))))
    scaled = next(iter(open_loader(spec_for(small_shards, engine, normalization=Normalization.of([10, 20, 30], [2, 4, 5])))))
    assert torch.allclose(scaled.images * torch.tensor([2.0, 4, 5])[:, None, None], plain.images, atol=1e-4)


def test_a_damaged_image_is_named(small_shards: Path, engine: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(small_shards, copy)
    loader = open_loader(spec_for(copy, engine))
    victim = int(plan.order(0, 0, [19], 60)[0])
    record = loader.shards.samples[victim]
    path = loader.shards.shards[record["shard"]]
    data = bytearray(path.read_bytes())
    data[int(record["offset"]) : int(record["offset"]) + int(record["bytes"])] = b"\0" * int(record["bytes"])
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"{path.name}: {loader.shards.key(victim)}: cannot be decoded"):
        ids(loader)


def test_a_truncated_shard_is_named(small_shards: Path, engine: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(small_shards, copy)
    tar = copy / "train" / "000002.tar"
    tar.write_bytes(tar.read_bytes()[:9000])
    with pytest.raises(UserError, match=r"000002.tar: has 9000 bytes"):
        ids(open_loader(spec_for(copy, engine)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scale": (20, 68)}, "image size"),
        ({"scale": (68, 36)}, "low <= high"),
        ({"batch_size": 61}, "fewer than one batch"),
        ({"batch_size": 9, "world_size": 2}, "multiple of the number of processes"),
        ({"rank": 1}, "rank"),
        ({"seed": -1}, "seed"),
        ({"threads": 0}, "threads"),
        ({"dtype": torch.float64}, "float64"),
        ({"normalization": "median"}, "median"),
        ({"training": False, "eval_short": 20}, "at least the image size"),
        ({"split": "test"}, "no split"),
        ({"device": "cuda:7"}, "no CUDA GPU"),
    ],
)
def test_a_bad_spec_is_refused(small_shards: Path, engine: str, changes: dict[str, object], words: str) -> None:
    if changes.get("device") and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match=words):
        open_loader(spec_for(small_shards, engine, **changes))


def test_an_unknown_engine_is_refused(small_shards: Path, engine: str) -> None:
    with pytest.raises(UserError, match=f"unknown engine 'warp'; choose from {engine}"):
        open_loader(spec_for(small_shards, "warp"))
