"""Images of which only the bytes under the crop are read give the pixels of whole images, with fewer bytes."""

from __future__ import annotations

import io
import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from pipeline import LoaderSpec, MultiCrop, PaddedCrop, RandomResizedCrop, ScaleJitter, open_loader
from pipeline.engines import ranges
from pipeline.engines.ranges import read_piece
from pipeline.errors import UserError
from pipeline.jpeg.region import cut
from pipeline.jpeg.transcode import transcode
from pipeline.store import files
from pipeline.store.tar import EncodedSample, write_shard
from tests.helpers import SUBSAMPLINGS, jpeg, random_image
from tests.pipeline.store.test_remote import gigabytes


class Counted(MemoryFileSystem):
    """Files in memory. reads: path and number of bytes of each range that was read."""

    protocol = "counted"
    store: dict[str, Any] = {}  # noqa: RUF012
    reads: list[tuple[str, int]] = []  # noqa: RUF012

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> Any:
        content = super().cat_file(path, start, end, **options)
        self.reads.append((path, len(content)))
        return content


@pytest.fixture(scope="module")
def data(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards of 12 images each, large enough to be read in parts, and some that cannot be."""
    folder = tmp_path_factory.mktemp("ranges")
    (folder / "train").mkdir()
    manifest = json.loads((small_shards / "manifest.json").read_text())
    split, records = manifest["splits"]["train"], []
    for shard, entry in enumerate(split["shards"]):
        tar, samples = folder / entry["file"], []
        for number in range(12):
            pixels = random_image(150 + 10 * number, 300 - 20 * shard, 12 * shard + number)
            encoded = transcode(jpeg(pixels, SUBSAMPLINGS[(shard + number) % len(SUBSAMPLINGS)]))
            encoded = png(pixels) if number == 3 else jpeg(pixels) if number == 4 else encoded
            samples.append(EncodedSample(f"{shard}_{number}", encoded, number % 3, *pixels.shape[:2]))
        records.append(write_shard(tar, tar.with_suffix(".idx"), shard, samples, 4))
        entry.update(images=12, bytes=tar.stat().st_size, sha256=files.sha256(str(tar)))
    np.save(folder / split["samples"], np.concatenate(records))
    split.update(images=12 * len(records), samples_sha256=files.sha256(str(folder / split["samples"])))
    (folder / "manifest.json").write_text(json.dumps(manifest | {"splits": {"train": split}}))
    shutil.copy(small_shards / "mean_image.npy", folder)
    return folder


def png(pixels: npt.NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


@pytest.fixture
def counted(data: Path) -> Iterator[str]:
    """The URL of `data` in memory."""
    fsspec.register_implementation("counted", Counted, clobber=True)
    for path in data.rglob("*"):
        if path.is_file():
            files.write(f"counted://bucket/{path.relative_to(data)}", path.read_bytes())
    Counted.reads = []
    yield "counted://bucket"
    Counted.store.clear()


def stored(name: str) -> Any:
    """A file in memory."""
    return next(file for path, file in Counted.store.items() if path.endswith(name))


class Stored:
    """An image of which parts are read. The rest is never seen."""

    def __init__(self, data: bytes) -> None:
        self.data, self.counts = np.frombuffer(data, np.uint8), list[int]()

    def read(self, start: int, count: int) -> npt.NDArray[np.uint8]:
        assert 0 <= start < start + count <= len(self.data)
        self.counts.append(count)
        return self.data[start : start + count]

    def piece(self, *region: Any) -> ranges.Piece:
        return read_piece(self.read, len(self.data), region)


@pytest.mark.parametrize("subsampling", ["444", "420", "440", "Gray"])
def test_a_piece_has_the_cut_of_the_whole_image(subsampling: str) -> None:
    """For windows at all edges, of the whole image, and of one pixel. Two ranges, with fewer bytes than the image."""
    image = Stored(transcode(jpeg(random_image(397, 501), subsampling)))
    assert len(image.data) > ranges.WHOLE
    rng = np.random.default_rng(0)
    regions = [(0, 0, 397, 501), (0, 0, 1, 1), (396, 500, 397, 501), (0, 200, 120, 501), (300, 0, 397, 90)]
    for _ in range(40):
        top, left = int(rng.integers(397)), int(rng.integers(501))
        regions.append((top, left, int(rng.integers(top, 397)) + 1, int(rng.integers(left, 501)) + 1))
    for region in regions:
        image.counts.clear()
        piece = image.piece(*region)
        assert piece.is_part
        assert not piece.data.flags.writeable
        found, expected = cut(piece.data, *region), cut(image.data, *region)
        assert found.jpeg.tobytes() == expected.jpeg.tobytes()
        assert len(image.counts) <= 2
        spared = len(image.data) - sum(image.counts)
        rows = (region[2] - region[0]) / 397
        assert spared >= (0.8 - rows) * len(image.data)


@pytest.mark.parametrize("kind", ["png", "no table", "damaged table", "long header", "small", "empty"])
def test_other_images_are_read_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = {"png": png(random_image(90, 70)), "no table": jpeg(random_image(200, 300)), "empty": b"x"}.get(kind)
    data = data or transcode(jpeg(random_image(200, 300)))
    if kind == "damaged table":
        data = data[:40] + b"\xff" * 8 + data[48:]
    if kind != "small":
        monkeypatch.setattr(ranges, "WHOLE", 0)
    monkeypatch.setattr(ranges, "HEAD", min(400 if kind == "long header" else 4096, len(data)))
    image = Stored(data)
    piece = image.piece(10, 10, 20, 20)
    assert not piece.is_part
    assert piece.data.tobytes() == data
    assert sum(image.counts) == len(data)


@pytest.mark.parametrize(
    "changes",
    [
        {"geometry": ScaleJitter(36, 68)},
        {"geometry": ScaleJitter(36, 68), "interpolation": "bicubic"},
        {"geometry": RandomResizedCrop(), "dtype": torch.uint8},
        {"geometry": PaddedCrop(4)},
        {"geometry": MultiCrop(((32, 2, (0.3, 1.0)), (16, 3, (0.05, 0.3))))},
        {"verify": True},
    ],
    ids=lambda changes: "-".join(str(value).partition("(")[0] for value in changes.values()),
)
def test_batches_equal_the_local_ones(
    data: Path, counted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """Some of these images are decoded by other decoders, which need the whole image."""
    monkeypatch.setattr(ranges, "HEAD", 1000)
    monkeypatch.setattr(ranges, "WHOLE", 0)
    spec = replace(LoaderSpec(data, batch_size=8, image_size=32, threads=2, geometry=ScaleJitter(36, 68)), **changes)
    remote = replace(spec, data=counted, cache=tmp_path, cache_gb=gigabytes(data, 2))
    parts, read = list[bool](), ranges.read_piece

    def spied(*arguments: Any) -> ranges.Piece:
        piece = read(*arguments)
        parts.append(piece.is_part)
        return piece

    monkeypatch.setattr(ranges, "read_piece", spied)
    with open_loader(spec) as local, open_loader(remote) as actual:
        for _ in range(2):
            for reference, found in zip(local, actual, strict=True):
                assert np.array_equal(reference.ids, found.ids)
                pairs = zip(*(one if isinstance(one, tuple) else (one,) for one in (reference.images, found.images)), strict=True)
                assert all(torch.equal(*pair) for pair in pairs)
    assert len(parts) > 96 if not spec.verify else not parts  # checksums need all bytes
    assert parts.count(True) >= 0.6 * len(parts)
    assert not list(tmp_path.glob("*.partial"))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 10_000  # samples.npy


def test_a_damaged_image_is_replaced_by_the_same_one(
    data: Path, counted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "HEAD", 1000)
    monkeypatch.setattr(ranges, "WHOLE", 0)
    spec = LoaderSpec(data, batch_size=8, image_size=32, threads=2, geometry=ScaleJitter(36, 68))
    record = open_loader(spec).shards.samples[5]
    content = stored(f"/train/{int(record['shard']):06d}.tar")
    content.seek(int(record["offset"]))
    content.write(bytes(int(record["bytes"])))
    with open_loader(replace(spec, data=counted, cache=tmp_path, cache_gb=gigabytes(data, 2))) as loader:
        for _ in range(2):
            assert all(5 not in batch.ids for batch in loader)
        assert loader.replaced >= 1


def test_errors_of_reads_and_short_shards_are_raised(data: Path, counted: str, tmp_path: Path) -> None:
    spec = LoaderSpec(counted, batch_size=8, image_size=32, cache=tmp_path, cache_gb=gigabytes(data, 2))
    stored("/train/000001.tar").truncate(3000)
    with open_loader(spec) as loader, pytest.raises(UserError, match=r"^counted://bucket/train/000001.tar: ends at \d+ bytes"):
        list(loader)
    fsspec.filesystem("counted").rm(f"{counted}/train/000001.tar")
    with open_loader(spec) as loader, pytest.raises(UserError, match=r"^counted://bucket/train/000001.tar: not found"):
        list(loader)


def test_images_are_read_ahead_and_closing_stops_it(
    data: Path, counted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many at a time as there may be requests, though there is one decoding thread."""
    running, enough = set[int](), threading.Event()
    reading = Counted.cat_file

    def read(self: Counted, path: str, *arguments: Any, **options: Any) -> Any:
        if path.endswith(".tar"):
            running.add(threading.get_ident())
            if len(running) == 16:
                enough.set()
            assert enough.wait(20)
        return reading(self, path, *arguments, **options)

    spec = LoaderSpec(counted, batch_size=8, image_size=32, threads=1, cache=tmp_path, cache_gb=gigabytes(data, 2))
    with open_loader(spec) as loader:
        monkeypatch.setattr(ranges, "WHOLE", 1 << 20)  # one read of each image
        monkeypatch.setattr(Counted, "cat_file", read)
        assert len(next(iter(loader)).ids) == 8
