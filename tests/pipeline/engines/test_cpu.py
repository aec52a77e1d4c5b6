"""The CPU engine reads and decodes the usual images of a chunk at once, without the GIL, to the same pixels as one by one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import LoaderSpec, open_loader
from pipeline.convert.images import convert_image
from pipeline.convert.make import ConvertOptions, make_shards
from pipeline.engines.cpu import CpuLoader
from pipeline.pixels.decoder import Decoder
from pipeline.plan.geometry import MultiCrop, PaddedCrop, TenCrop
from pipeline.store import local
from pipeline.store.entries import Lazy
from pipeline.store.local import LocalFiles
from tests.helpers import jpeg, random_image
from tests.pipeline.contract.helpers import spec_for


@pytest.fixture(scope="module")
def lossless(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lossless") / "data"
    make_shards(ConvertOptions(str(image_folder), str(out), workers=1, shard_size=8))
    return out


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The indices of images that are not made at once."""
    found: list[int] = []
    make = CpuLoader.make_or_replace

    def record(loader: CpuLoader, decoder: Decoder, plan: Any, index: int, out: Any) -> None:
        found.append(index)
        make(loader, decoder, plan, index, out)

    monkeypatch.setattr(CpuLoader, "make_or_replace", record)
    return found


def epochs(spec: LoaderSpec, count: int) -> list[list[torch.Tensor]]:
    """The images of some epochs. All shards are open after the first one."""
    loader = open_loader(spec)
    found = [[group.clone() for batch in loader for group in flat(batch.images)] for _ in range(count)]
    loader.close()
    return found


def flat(images: Any) -> tuple[torch.Tensor, ...]:
    return images if isinstance(images, tuple) else (images,)


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": torch.uint8},
        {"dtype": torch.float32, "batch_size": 28},
        {"geometry": PaddedCrop(4), "dtype": torch.bfloat16},
        {"geometry": TenCrop(36), "dtype": torch.float32},
    ],
    ids=str,
)
def test_images_made_at_once_have_the_pixels_of_those_made_one_by_one(
    lossless: Path, one_by_one: list[int], monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    spec = spec_for(lossless, "cpu", threads=2, **changes)
    if isinstance(spec.geometry, TenCrop):
        spec = dataclasses.replace(spec.evaluation(), geometry=spec.geometry)
    at_once = epochs(spec, 2)
    first = len(one_by_one)
    assert first < sum(len(images) for images in at_once[1]) // spec.geometry.crops  # those that opened their shards
    monkeypatch.setattr(local, "_FLAGS", 0)
    expected = epochs(spec, 2)
    assert len(one_by_one) - first >= sum(len(images) for images in at_once[0] + at_once[1]) // spec.geometry.crops
    for found, other in zip(at_once[0] + at_once[1], expected[0] + expected[1], strict=True):
        assert torch.equal(found, other)


@pytest.mark.parametrize(
    "changes",
    [{"interpolation": "bicubic"}, {"verify": True}, {"geometry": MultiCrop(((32, 1, (0.3, 1.0)), (16, 2, (0.1, 0.3))))}],
)
def test_other_images_are_made_one_by_one(lossless: Path, one_by_one: list[int], changes: dict[str, Any]) -> None:
    batches = epochs(spec_for(lossless, "cpu", dtype=torch.uint8, **changes), 1)[0]
    assert len(one_by_one) >= len(batches) // (2 if "geometry" in changes else 1) * 8


def test_images_are_made_one_by_one_where_memory_is_short(
    lossless: Path, one_by_one: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    spec = spec_for(lossless, "cpu", dtype=torch.uint8)
    expected = epochs(spec, 1)[0]
    one_by_one.clear()
    monkeypatch.setattr(LocalFiles, "read_cached", fail)
    found = epochs(spec, 1)[0]
    assert len(one_by_one) >= 8 * len(found)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_parts_are_read_at_once_only_if_their_files_are_as_expected(tmp_path: Path) -> None:
    """The slower read says what is wrong."""
    content = np.random.default_rng(0).bytes(10_000)
    paths = [tmp_path / name for name in ("open", "closed", "changed")]
    for path in paths:
        path.write_bytes(content)
    opened = LocalFiles(Lazy(3, lambda number: str(paths[number])))
    for number in (0, 2):
        opened.open(number)
    paths[2].write_bytes(content[:-1])
    numbers, starts, counts = np.array([0, 1, 2, 0, 0]), np.array([5, 0, 0, 9_000, 9_001]), np.array([100, 10, 10, 1_000, 1_000])
    parts = opened.read_cached(numbers, np.full(5, len(content)), starts, counts)
    assert parts is not None
    assert parts.ready.tolist() == [True, False, False, True, False]
    found = np.split(parts.data, parts.ends[:-1])
    assert found[0].tobytes() == content[5:105]
    assert found[3].tobytes() == content[9_000:]


def test_images_that_the_compiled_decoder_refuses_are_left() -> None:
    """Those before and behind them are made, also where the decoder's memory has to grow in between."""
    stored = [jpeg(random_image(64, 64, 1)), b"", random_image(8, 8, 2).tobytes(), jpeg(random_image(900, 900, 3))]
    images = [convert_image(data, "lossless").data if data[:2] == b"\xff\xd8" else data for data in stored]
    data = np.frombuffer(b"".join(images), np.uint8)
    ends = np.cumsum([len(image) for image in images])
    sizes = np.array([64, 8, 8, 900])
    windows = np.array([[0.0, 0.0, size, size] for size in sizes])
    out, left = np.zeros((4, 32, 32, 3), np.uint8), np.array([True, True, True, True])
    flip = np.array([False, False, False, True])
    Decoder().make_several(data, ends, sizes, sizes, windows, flip, out, left)
    assert left.tolist() == [False, True, True, False]
    assert not out[1:3].any()
    for index in (0, 3):
        alone, image = np.zeros((1, 32, 32, 3), np.uint8), np.frombuffer(images[index], np.uint8)
        Decoder().make_views(image, sizes[index], sizes[index], windows[index : index + 1], flip[index : index + 1], alone)
        assert np.array_equal(alone[0], out[index])
