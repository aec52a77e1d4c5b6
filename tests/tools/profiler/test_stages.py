"""The profiler's stages: they compute the same as the CPU engine, and their speeds are correct."""

from __future__ import annotations

import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import simplejpeg
import torch

from pipeline import open_loader
from pipeline.errors import UserError
from pipeline.plan.geometry import Geometry, PaddedCrop, ScaleJitter
from pipeline.spec import LoaderSpec
from pipeline.store.shards import ShardSet
from tests.helpers import open_image
from tools.profiler import stages
from tools.profiler.convert import convert
from tools.profiler.stages import Measured, Samples, measure_stages, speed

SIZE = 32
STORED_AS = {torch.uint8: np.uint8, torch.float32: np.float32, torch.bfloat16: np.uint16}


def spec_for(shards: Path, dtype: torch.dtype = torch.float32) -> LoaderSpec:
    return LoaderSpec(shards, batch_size=8, image_size=SIZE, geometry=ScaleJitter(36, 68), dtype=dtype, threads=1, engine="cpu")


@pytest.fixture(scope="module")
def lossless(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of the training images, with profile lossless."""
    out = tmp_path_factory.mktemp("lossless") / "shards"
    convert(image_folder / "train", out, "lossless", 60, beton=False)
    return out


@pytest.fixture
def opened() -> Iterator[Any]:
    """Opens `Samples`, and closes them after the test."""
    all_samples: list[Samples] = []

    def open_samples(spec: LoaderSpec) -> Samples:
        all_samples.append(Samples(spec))
        return all_samples[-1]

    yield open_samples
    for samples in all_samples:
        samples.close()


def loaded(spec: LoaderSpec) -> dict[tuple[int, int], npt.NDArray[Any]]:
    """The images of the engine's first epoch, by batch and place: (H, W, 3), with bfloat16 as bits."""
    loader = open_loader(spec)
    found = {}
    for number, batch in enumerate(loader):
        images = batch.images.permute(0, 2, 3, 1)
        bits = images.view(torch.int16) if spec.dtype == torch.bfloat16 else images
        for place, image in enumerate(bits.numpy().view(STORED_AS[spec.dtype]).copy()):
            found[number, place] = image
    loader.close()
    return found


def keys(samples: Samples) -> list[tuple[int, int]]:
    """Batch and place of each sample."""
    numbers = {id(plan): number for number, plan in enumerate(samples.plans)}
    return [(numbers[id(plan)], place) for plan, place in samples.places]


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["original", "lossless"])
def test_decoding_and_resampling_equal_the_engine(small_shards: Path, lossless: Path, opened: Any, profile: str) -> None:
    spec = spec_for(small_shards if profile == "original" else lossless, torch.uint8)
    expected = loaded(spec)
    samples = opened(spec)
    assert sorted(expected) == keys(samples)
    for number, key in enumerate(keys(samples)):
        pixels, where = samples.decode(number)
        assert np.array_equal(pixels, samples.decoded[number][0])
        assert where.tolist() == samples.decoded[number][1].tolist()
        samples.resample(number)
        assert np.array_equal(samples.buffers().image[0], expected[key])


@pytest.mark.parametrize("geometry", [ScaleJitter(36, 68), PaddedCrop(12)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalization_equals_the_engine(small_shards: Path, opened: Any, dtype: torch.dtype, geometry: Geometry) -> None:
    spec = replace(spec_for(small_shards, dtype), geometry=geometry)
    expected = loaded(spec)
    samples = opened(spec)
    for number, key in enumerate(keys(samples)):
        samples.resample(number)
        normalized = samples.normalize(number)
        assert normalized.dtype == STORED_AS[dtype]
        assert np.array_equal(normalized[0], expected[key])


def test_assembly_makes_whole_batches(small_shards: Path, opened: Any) -> None:
    spec = spec_for(small_shards)
    samples = opened(spec)
    loader = open_loader(spec)
    for number, batch in enumerate(loader):
        assembled = samples.assembly(number)
        assert assembled.ids.tolist() == batch.ids.tolist()
        assert assembled.labels.tolist() == batch.labels.tolist()
        assert (assembled.images.shape, assembled.images.dtype) == (batch.images.shape, batch.images.dtype)
    assert number == 6
    loader.close()


def test_a_cut_decodes_to_the_same_pixels(lossless: Path, opened: Any) -> None:
    samples = opened(spec_for(lossless))
    lengths = []
    for number in range(len(samples.places)):
        length = samples.cut(number)
        own = samples.buffers()
        piece = own.cut[:length].tobytes()
        top, left, height, width = own.place.tolist()
        assert simplejpeg.decode_jpeg_header(piece)[:2] == (height, width)
        whole = np.asarray(open_image(samples.stored[number].tobytes()).convert("RGB")).astype(int)
        inside = whole[top : top + height, left : left + width]
        assert np.abs(inside - simplejpeg.decode_jpeg(piece)).mean() < 2  # chroma differs at the edges of the cut
        lengths.append(length / len(samples.stored[number]))
    assert min(lengths) < 0.8


def test_reading_touches_the_stored_image(small_shards: Path, opened: Any) -> None:
    samples = opened(spec_for(small_shards))
    shards = ShardSet(small_shards, "train")
    for number, (plan, place) in enumerate(samples.places[:10]):
        stored = shards.read(int(plan.ids[place]))
        assert np.array_equal(samples.stored[number], stored)
        assert samples.read(number) == int(stored[:: stages.PAGE].astype(np.int64).sum()) + int(stored[-1])


def overwrite(shards: Path, samples: list[int]) -> None:
    """Overwrite training images with zeros."""
    opened = ShardSet(shards, "train")
    for sample in samples:
        record = opened.samples[sample]
        with opened.shards[record["shard"]].open("r+b") as stream:
            stream.seek(int(record["offset"]))
            stream.write(bytes(int(record["bytes"])))


def test_corrupt_images_are_left_out(small_shards: Path, tmp_path: Path, opened: Any) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(small_shards, shards)
    whole = opened(spec_for(shards))
    planned = [int(plan.ids[place]) for plan, place in whole.places]
    assert len(planned) == 56
    overwrite(shards, planned[3:5])
    samples = opened(spec_for(shards))
    assert [int(plan.ids[place]) for plan, place in samples.places] == planned[:3] + planned[5:]
    assert len(samples.stored) == len(samples.decoded) == 54
    measured = measure_stages(spec_for(shards), [1], 2, 0.02).measured
    assert measured["decode"].at(1).mean > 0
    overwrite(shards, list(range(60)))
    with pytest.raises(UserError, match="none of the sampled images can be decoded"):
        measure_stages(spec_for(shards), [1], 2, 0.02)


@pytest.mark.parametrize("threads", [1, 4])
def test_calls_per_second(threads: int) -> None:
    """Each call takes 5 ms."""
    calls: Counter[int] = Counter()
    by_thread: dict[int, set[int]] = {}

    def stage(number: int) -> None:
        time.sleep(0.005)
        calls[number] += 1
        by_thread.setdefault(threading.get_ident(), set()).add(number)

    began = time.perf_counter()
    found = speed(stage, 10, threads, 0.3)
    took = time.perf_counter() - began
    assert 140 * threads < found <= 200 * threads
    assert found == pytest.approx(calls.total() / took, rel=0.05)
    assert set(calls) == set(range(10))
    shares = sorted(sorted(numbers) for numbers in by_thread.values())
    assert shares == [list(range(first, 10, threads)) for first in range(threads)]


def test_more_threads_than_samples() -> None:
    calls: Counter[int] = Counter()

    def stage(number: int) -> None:
        time.sleep(0.005)
        calls[number] += 1

    assert speed(stage, 2, 8, 0.1) <= 400
    assert set(calls) == {0, 1}
    assert speed(stage, 2, 1, 0) <= 200  # at least one call


def test_milliseconds_per_image() -> None:
    measured = Measured("decode", {1: [90.0, 110.0], 4: [300.0, 340.0]})
    assert measured.at(4).mean == 320
    assert measured.ms_per_image(1) == pytest.approx(10.0)
    assert measured.ms_per_image(4) == pytest.approx(12.5)  # of each thread
    alone = Measured("assembly", {1: [1000.0, 1000.0]})
    assert alone.at(4).mean == 1000
    assert alone.ms_per_image(4) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("profile", "dtype", "names"),
    [
        ("original", torch.float32, ["read cold", "read warm", "decode", "resample", "normalize", "assembly"]),
        ("original", torch.uint8, ["read cold", "read warm", "decode", "resample", "assembly"]),
        ("lossless", torch.bfloat16, ["read cold", "read warm", "cut", "decode", "resample", "normalize", "assembly"]),
    ],
)
def test_all_stages_are_measured(small_shards: Path, lossless: Path, profile: str, dtype: torch.dtype, names: list[str]) -> None:
    shards = small_shards if profile == "original" else lossless
    found = measure_stages(spec_for(shards, dtype), [1, 2], 3, 0.02)
    assert list(found.measured) == names
    for name, measured in found.measured.items():
        assert measured.name == name
        assert {threads: len(speeds) for threads, speeds in measured.speeds.items()} == (
            {1: 3} if name == "assembly" else {1: 3, 2: 3}
        )
        assert all(value > 0 for speeds in measured.speeds.values() for value in speeds)
    assert found.measured["read warm"].at(1).mean > found.measured["decode"].at(1).mean
    assert found.cold_bytes is None or found.cold_bytes > 0


def test_cold_reading_reads_each_image_once_from_new_maps(small_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[list[int]] = []
    sets: dict[int, ShardSet] = {}
    plain_read, plain_drop = ShardSet.read, stages.drop_pages

    def counted(self: ShardSet, index: int) -> Any:
        turns[-1].append(index)
        sets[id(self)] = self
        return plain_read(self, index)

    def dropped(files: list[Path]) -> None:
        turns.append([])
        assert [file.name for file in files] == [f"{number:06d}.tar" for number in range(4)]
        plain_drop(files)

    monkeypatch.setattr(ShardSet, "read", counted)
    monkeypatch.setattr(stages, "drop_pages", dropped)
    measured, _ = stages.read_cold(spec_for(small_shards), [1, 3], 2, 10)
    assert [sorted(turn) for turn in turns] == [list(range(60))] * 4
    assert len(sets) == 4
    assert turns[0] != sorted(turns[0])
    assert {threads: len(speeds) for threads, speeds in measured.speeds.items()} == {1: 2, 3: 2}
