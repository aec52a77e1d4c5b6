"""The cost of Cropfeed's format alone: decoding of cuts without a pipeline, and the bytes of a file that a crop reads."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import simplejpeg

from pipeline.jpeg.region import APP11, MAGIC, Bytes, cut
from pipeline.plan import sampling
from pipeline.store.shards import ShardSet
from tools.bench.peers.job import Job
from tools.profiler.storage import drop_pages

EPOCHS = 3  # with different crops of the same images
PAGE = mmap.PAGESIZE


def decode(job: Job) -> Iterator[tuple[Any, Any]]:
    """Decode prepared cuts with simplejpeg into one buffer, in one thread: the minimum work of each Cropfeed engine."""
    shards = ShardSet(Path(job.data) / "shards", "train")
    cuts = [
        cut(shards.read(index), *region).jpeg.copy()
        for epoch in range(EPOCHS)
        for index, region in enumerate(regions(shards, job, epoch).tolist())
    ]
    buffer = np.empty(max(3 * height * width for height, width, *_ in map(simplejpeg.decode_jpeg_header, cuts)), np.uint8)
    images = np.empty((job.batch_size, job.size, job.size, 3), job.out)  # never filled, as images are only counted
    at = 0
    while True:
        for _ in range(job.batch_size):
            simplejpeg.decode_jpeg(cuts[at], buffer=buffer)
            at = (at + 1) % len(cuts)
        yield images, images


def regions(shards: ShardSet, job: Job, epoch: int) -> npt.NDArray[np.int64]:
    """The region that the crop of each image needs, in whole pixels: int64 (N, 4) of top, left, bottom, right."""
    heights, widths = shards.samples["height"].astype(np.int64), shards.samples["width"].astype(np.int64)
    draws = sampling.draw(0, epoch, np.arange(len(shards)), heights, widths, job.scale, job.size)
    return sampling.regions(sampling.windows(draws, heights, widths, job.size), heights, widths, job.size)


class Touched(NamedTuple):
    """Bytes of each image that its crop reads, int64 (N,). needed: bytes that a cut reads. loaded: bytes that a cold page cache
    loads for the cut, in whole pages, with madvise(MADV_RANDOM); None if the file system cannot drop pages. stored: bytes of the
    whole image."""

    needed: npt.NDArray[np.int64]
    loaded: npt.NDArray[np.int64] | None
    stored: npt.NDArray[np.int64]


def touched(job: Job) -> Touched:
    """Measure the cut of each image in an epoch."""
    shards = ShardSet(Path(job.data) / "shards", "train")
    windows = regions(shards, job, 0).tolist()
    needed = [len(cut(shards.read(i), *window).jpeg) + table_bytes(shards.read(i)) for i, window in enumerate(windows)]
    files, samples = shards.shards, shards.samples.copy()
    del shards  # closes its maps, because mapped pages cannot be dropped
    pages = [
        pages_loaded(files[sample["shard"]], int(sample["offset"]), int(sample["bytes"]), window)
        for sample, window in zip(samples, windows, strict=True)
    ]
    loaded = None if None in pages else np.array(pages, np.int64) * PAGE
    return Touched(np.array(needed, np.int64), loaded, samples["bytes"].astype(np.int64))


def table_bytes(jpeg: Bytes) -> int:
    """Bytes of the table of segment lengths, which a cut reads but does not contain."""
    data = jpeg.tobytes()
    at = 4 + int.from_bytes(data[4:6], "big") if data[2:4] == b"\xff\xe0" else 2
    start = at
    while data[at : at + 2] == bytes([0xFF, APP11]) and data[at + 4 : at + 4 + len(MAGIC)] == MAGIC:
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return at - start


def pages_loaded(file: Path, offset: int, count: int, window: list[int]) -> int | None:
    """Number of pages that a cut of an image loads into an empty page cache; None if pages cannot be dropped. file: the shard.
    offset, count: the image's bytes in it."""
    drop_pages([file])
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        mapped.madvise(mmap.MADV_RANDOM)
        content = np.frombuffer(mapped, np.uint8)
        before = resident(content)
        cut(content[offset : offset + count], *window)
        after = resident(content)
        del content  # otherwise the map cannot be closed
    return None if before else after


def resident(content: Bytes) -> int:
    """Number of a map's pages that are in memory, by mincore(2)."""
    found = np.zeros(-(-len(content) // PAGE), np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mincore(ctypes.c_void_p(content.ctypes.data), ctypes.c_size_t(len(content)), ctypes.c_void_p(found.ctypes.data)):
        raise OSError(ctypes.get_errno(), "mincore")
    return int((found & 1).sum())
