"""The behaviour that all engines inherit from `Loader`, with an engine that decodes nothing. Real engines: the contract suite."""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections import Counter
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import choose_engine, open_loader
from pipeline.batch import Batch, BatchRange
from pipeline.convert.beton import BetonSettings
from pipeline.errors import UserError
from pipeline.loader import Loader
from pipeline.plan import sampling
from pipeline.plan.geometry import CentreCrop, Geometry, PaddedCrop, ScaleJitter, WholeImage
from pipeline.spec import LoaderSpec
from pipeline.store import files
from pipeline.store.shards import Manifest


class Blank(Loader):
    """An engine that makes black views, and cannot decode the samples in `bad`."""

    engine = "blank"
    bad: frozenset[int] = frozenset()

    def _make_batch(self, batch_range: BatchRange) -> Batch:
        plan = self.plan(batch_range)
        for index in range(len(plan.ids)):
            while int(plan.ids[index]) in self.bad:
                self.replace(plan, index, "it is bad")
        return self.finish([torch.zeros(len(plan.views.flip), *plan.size, 3, dtype=torch.uint8)], plan)


def spec_for(data: Path, **changes: Any) -> LoaderSpec:
    return replace(LoaderSpec(data, batch_size=8, image_size=4, geometry=ScaleJitter(5, 8)), **changes)


def ids(loader: Loader) -> list[int]:
    return [int(sample) for batch in loader for sample in batch.ids]


def test_the_epoch_is_set_as_for_a_distributed_sampler(small_shards: Path) -> None:
    spec = spec_for(small_shards)
    plain = Blank(spec)
    expected = [ids(plain) for _ in range(4)]
    loader = Blank(spec)
    found = []
    for epoch in (0, 1, 3, 1):
        loader.set_epoch(epoch)
        found.append(ids(loader))
    assert found == [expected[epoch] for epoch in (0, 1, 3, 1)]
    loader.seek(2, 16)  # resumed in the middle of an epoch
    loader.set_epoch(2)
    assert ids(loader) == expected[2][16:]


def test_collate_makes_what_is_yielded(small_shards: Path) -> None:
    def as_dict(batch: Batch) -> dict[str, Any]:
        return {"pixel_values": batch.images / 255, "labels": batch.labels, "ids": batch.ids}

    found: Any
    plain, loader = Blank(spec_for(small_shards)), Blank(spec_for(small_shards, collate=as_dict))
    assert loader.fingerprint() == plain.fingerprint()
    for batch, found in zip(plain, loader, strict=True):
        assert found["ids"].tolist() == batch.ids.tolist()
        assert torch.equal(found["pixel_values"], batch.images / 255)
    assert loader.state_dict() == plain.state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_images_are_channels_last_or_contiguous(small_shards: Path, dtype: torch.dtype) -> None:
    spec = spec_for(small_shards, dtype=dtype)
    with open_loader(spec) as loader, open_loader(replace(spec, channels_last=False)) as other:
        assert loader.fingerprint() == other.fingerprint()
        images, contiguous = next(iter(loader)).images, next(iter(other)).images
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert contiguous.is_contiguous()
    assert not images.is_contiguous()
    assert torch.equal(images, contiguous)


def test_imagenet_normalization_is_torchvisions(small_shards: Path) -> None:
    """ToTensor divides by 255; Normalize subtracts the mean and divides by the standard deviation of values in 0..1."""
    spec = spec_for(small_shards, alpha_std=0.0)
    pixels = next(iter(open_loader(replace(spec, dtype=torch.uint8)))).images.numpy()
    images = next(iter(open_loader(replace(spec, normalization="imagenet")))).images.numpy()
    mean, std = (np.array(one)[:, None, None] for one in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    assert np.allclose(images, (pixels / 255 - mean) / std, atol=1e-5)


def test_the_interpolation_is_in_the_fingerprint(small_shards: Path) -> None:
    """Only if it is not bilinear: tests/compatibility has the fingerprints of older checkpoints."""
    plain, bicubic = (Blank(spec_for(small_shards, interpolation=name)) for name in ("bilinear", "bicubic"))
    assert plain.fingerprint() != bicubic.fingerprint()
    assert plain.fingerprint() == Blank(spec_for(small_shards)).fingerprint()
    with pytest.raises(UserError, match="other data, seed, order, image size or augmentation"):
        bicubic.load_state_dict(plain.state_dict())
    with pytest.raises(UserError, match="`interpolation` is bilinear or bicubic, not 'nearest'"):
        Blank(spec_for(small_shards, interpolation="nearest"))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("batch_size", [1, 5, 8, 59, 60, 64])
@pytest.mark.parametrize("order", ["full", "blocks", "sequential"])
def test_every_sample_comes_once(small_shards: Path, world_size: int, batch_size: int, order: str) -> None:
    spec = spec_for(small_shards, training=False, batch_size=batch_size, order=order, block_shards=3, world_size=world_size)
    for epoch in (0, 3):
        seen: Counter[int] = Counter()
        for rank in range(world_size):
            loader = Blank(replace(spec, rank=rank))
            loader.seek(epoch, 0)
            seen.update(ids(loader))
        assert seen == Counter(range(60))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("batch_size", [1, 4, 60])
def test_whole_images_come_once_in_batches_of_one_size(small_shards: Path, world_size: int, batch_size: int) -> None:
    spec = spec_for(small_shards, batch_size=batch_size, world_size=world_size).evaluation("train", geometry=WholeImage(20))
    seen: Counter[int] = Counter()
    for rank in range(world_size):
        loader = Blank(replace(spec, rank=rank))
        sizes = {}
        for batch in loader:
            seen.update(batch.ids.tolist())
            sizes.update(dict.fromkeys(batch.ids.tolist(), tuple(batch.images.shape[2:])))
        records = loader.shards.samples
        for sample, size in sizes.items():
            height, width = sampling.resized([records[sample]["height"]], [records[sample]["width"]], 20)
            assert size == (height[0], width[0])
    assert seen == Counter(range(60))


@pytest.mark.parametrize("order", ["full", "blocks"])
def test_any_position_can_be_resumed_with_other_ranks_and_batch_sizes(small_shards: Path, order: str) -> None:
    spec = spec_for(small_shards, order=order, block_shards=2)
    expected = ids(Blank(replace(spec, training=False)))
    for consumed in range(0, 57, 7):
        for world_size, batch_size in ((1, 8), (2, 4), (3, 3)):
            batches = []
            for rank in range(world_size):
                loader = Blank(replace(spec, world_size=world_size, rank=rank, batch_size=batch_size))
                loader.load_state_dict(loader.state_dict() | {"consumed": consumed})
                batches.append([batch.ids.tolist() for batch in loader])
            found = [sample for step in zip(*batches, strict=True) for batch in step for sample in batch]
            whole = (60 // batch_size * batch_size - consumed) // batch_size * batch_size
            assert found == expected[consumed : consumed + whole]


def test_upcoming_ranges_continue_across_epochs(small_shards: Path) -> None:
    loader = Blank(spec_for(small_shards, world_size=2, rank=1))
    ranges = list(loader.batch_ranges(0, 0))
    found = list(islice(loader.upcoming(ranges[5]), 4))
    assert found == [ranges[5], ranges[6], *islice(loader.batch_ranges(1, 0), 2)]


# --- Specs


def test_image_sizes_are_a_function_of_the_epoch() -> None:
    spec = LoaderSpec("nowhere", image_size=((0, 128), (6, 160), (12, 224)))
    assert [spec.size_at(epoch) for epoch in (0, 5, 6, 11, 12, 90)] == [128, 128, 160, 160, 224, 224]
    assert spec.final_size == 224
    assert spec.geometry_at(224) == ScaleJitter(256, 480)
    assert spec.geometry_at(128) == ScaleJitter(146, 274)
    assert LoaderSpec("nowhere", image_size=96).size_at(7) == 96


def test_evaluation_uses_the_central_crop_in_proportion() -> None:
    spec = LoaderSpec("nowhere", image_size=((0, 56), (3, 112)), order="blocks", batch_size=64)
    found = spec.evaluation()
    assert (found.split, found.training, found.order, found.corrupt) == ("val", False, "sequential", "stop")
    assert (found.image_size, found.geometry, found.batch_size) == (112, CentreCrop(128), 64)
    assert spec.evaluation("train", 5, WholeImage(64)).geometry == WholeImage(64)
    assert spec.evaluation("train", 5).batch_size == 5


def test_evaluation_after_padded_crops_is_at_their_size() -> None:
    """He et al. 2015, section 4.2: the single view of the original 32 x 32 image."""
    spec = LoaderSpec("nowhere", image_size=((0, 16), (3, 32)), geometry=PaddedCrop(4))
    assert spec.geometry_at(16) == PaddedCrop(2)
    assert spec.evaluation().geometry == CentreCrop(32)
    assert spec.evaluation(geometry=CentreCrop(36)).geometry == CentreCrop(36)


def test_an_unknown_engine_is_refused(small_shards: Path) -> None:
    with pytest.raises(UserError, match=r"unknown engine 'warp'; choose from .*dali"):
        open_loader(spec_for(small_shards, engine="warp"))


@pytest.mark.parametrize(
    ("device", "dali", "tars", "cores", "engine", "words"),
    [
        ("cpu", True, True, 2, "cpu", "stay on the CPU"),
        ("cuda", True, True, 3, "dali", "decodes on the GPU, as this process has only 3 cores"),
        ("cuda:1", True, True, 4, "cpu", "this process has 4 cores to decode with"),
        ("cuda", False, True, 16, "cpu", "this process has 16 cores to decode with"),
        ("cuda:1", False, True, 1, "cpu", "decode on the GPU as this process has only 1 core, is not installed"),
        ("cuda", True, False, 16, "ffcv", "only FFCV files"),
    ],
)
def test_auto_chooses_the_fastest_engine_and_says_why(
    small_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    dali: bool,
    tars: bool,
    cores: int,
    engine: str,
    words: str,
) -> None:
    manifest = json.loads((small_shards / "manifest.json").read_text())
    if not tars:
        manifest["splits"]["train"] |= {
            "shards": [],
            "beton": {"file": "train.beton", "sha256": "0" * 64, "settings": asdict(BetonSettings())},
        }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    if not dali:
        monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(2 * cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr("pipeline.cores.core_quota", lambda _: float("inf"))
    name, reason = choose_engine(spec_for(tmp_path, device=device))
    assert name == engine
    assert words in reason


def test_the_engine_and_the_reason_are_logged(
    small_shards: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the manifest, which may be large, is read once."""
    paths, read = [], files.read
    monkeypatch.setattr(files, "read", lambda path, *where: paths.append(path) or read(path, *where))  # type: ignore[func-returns-value]
    caplog.set_level(logging.INFO, "cropfeed")
    loader = open_loader(spec_for(small_shards, engine="auto"))
    assert paths.count(f"{small_shards}/manifest.json") == 1
    assert caplog.messages == [f"{small_shards}, train: engine cpu, batches stay on the CPU, where it is the fastest"]
    assert (loader.engine, loader.engine_reason) == ("cpu", "batches stay on the CPU, where it is the fastest")


# --- Corrupt samples


def test_batches_do_not_depend_on_which_corrupt_samples_are_known(small_shards: Path) -> None:
    """Batches are the same if corrupt samples are found in this epoch, known from an earlier one, or found after resuming."""
    bad = frozenset(range(0, 60, 3))
    loaders = [Blank(spec_for(small_shards)) for _ in range(2)]
    for loader in loaders:
        loader.bad = bad
    first = [ids(loaders[0]) for _ in range(3)]
    assert not bad & {sample for epoch in first for sample in epoch}
    loaders[1].seek(2, 0)
    assert ids(loaders[1]) == first[2]
    loaders[0].seek(0, 0)
    assert ids(loaders[0]) == first[0]
    assert loaders[0].substitutes.corrupt == dict.fromkeys(bad, "it is bad")
    planned = [sampling.order(0, epoch, np.arange(56), 60) for epoch in (0, 1, 2, 0)]
    assert loaders[0].replaced == sum(int(np.isin(epoch, list(bad)).sum()) for epoch in planned)


@pytest.mark.parametrize("geometry", [ScaleJitter(5, 8), PaddedCrop(3)])
def test_a_replacement_has_its_own_draws(small_shards: Path, geometry: Geometry) -> None:
    loader = Blank(spec_for(small_shards, geometry=geometry))
    batch_range = next(loader.batch_ranges(0, 0))
    before = loader.plan(batch_range)
    victim = int(before.ids[3])
    after = loader.plan(batch_range)
    loader.replace(after, 3, "it is bad")
    other = sampling.substitute(0, 0, victim, 0, 60)
    assert after.ids[3] == other
    record = loader.shards.samples[other]
    assert (after.heights[3], after.widths[3]) == (record["height"], record["width"])
    its = geometry.views(0, 0, np.array([other]), after.heights[3:4], after.widths[3:4], 4, sampling.ALPHA_STD)
    replanned = loader.plan(batch_range).views
    columns = zip(after.views.arrays, its.arrays, before.views.arrays, replanned.arrays, strict=True)
    for number, (column, own, old, planned) in enumerate(columns):
        assert np.array_equal(column[3], own[0])
        assert np.array_equal(np.delete(column, 3, 0), np.delete(old, 3, 0))
        assert np.array_equal(column, planned)
        assert number == 1 or not np.array_equal(column, old)  # flips may be the same


def test_threads_may_replace_at_the_same_time(small_shards: Path) -> None:
    loader = Blank(spec_for(small_shards, batch_size=60))
    loader.bad = frozenset(range(50))
    plan = loader.plan(next(loader.batch_ranges(0, 0)))

    def replace_bad(index: int) -> None:
        while int(plan.ids[index]) in loader.bad:
            loader.replace(plan, index, "it is bad")

    threads = [threading.Thread(target=replace_bad, args=(index,)) for index in range(60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.array_equal(plan.ids, loader.plan(plan.batch_range).ids)
    assert set(plan.ids.tolist()) <= set(range(50, 60))


# --- Size


class BillionSamples:
    """Replaces a ShardSet and its samples, which are created on access."""

    count, nbytes = 10**9 + 1, 0
    sizes = [10_000] * 100_000 + [1]

    def __init__(self, manifest: Manifest) -> None:
        self.manifest, self.samples = manifest, self

    def __len__(self) -> int:
        return self.count

    def image_sizes(self, ids: Any) -> Any:
        assert len(ids) <= 256, "more samples were read than a batch has"
        return np.full(len(ids), 375), np.full(len(ids), 500)

    def check_cache(self, warns: bool) -> None: ...

    def prefetch(self, shards: list[int]) -> None:
        assert len(shards) == 16


@pytest.mark.parametrize("order", ["full", "blocks", "sequential"])
def test_start_up_and_planning_do_not_grow_with_the_number_of_samples(
    small_shards: Path, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    shards = BillionSamples(Manifest(small_shards))
    monkeypatch.setattr(Loader, "_open_shards", lambda *_: shards)
    loader = Blank(spec_for(small_shards, order=order, batch_size=256, training=False))
    assert len(loader) == 10**9 // 256 + 1
    plan = loader.plan(next(loader.batch_ranges(1, 123_456 * 256)))
    assert len(np.unique(plan.ids)) == 256


def test_blocks_need_shards(small_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = BillionSamples(Manifest(small_shards))
    shards.sizes = []  # as in a data set with only FFCV files
    monkeypatch.setattr(Loader, "_open_shards", lambda *_: shards)
    with pytest.raises(UserError, match="blocks need shards"):
        Blank(spec_for(small_shards, order="blocks"))
