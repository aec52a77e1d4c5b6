"""The storage of the shards: its maximum read speed, dropping of the page cache, and reading from a copy in memory."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.spec import LoaderSpec
from pipeline.store.shards import ShardSet
from tools.profiler.measuring import NEVER, Estimate, in_turns

PIECE = 4 << 20  # bytes per read
STREAMS = (1, 4, 16)
MEMORY = "/dev/shm"  # a file system in memory (tmpfs)


def drop_pages(files: Iterable[Path]) -> None:
    """Drop these files from the page cache, so that the next read comes from the storage.

    Mapped pages stay in the cache, and some file systems ignore the request.
    """
    for file in files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())  # dirty pages cannot be dropped
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def local_files(spec: LoaderSpec) -> list[Path]:
    """The existing local files, tars and .beton, that hold the images of `spec`."""
    shards = ShardSet(spec.data, spec.split, spec.cache, spec.cache_gb, tars=False)
    beton = shards.manifest.splits[spec.split].get("beton")
    files = [*shards.shards, *([Path(shards.manifest.root) / beton["file"]] if beton else [])]
    return [file for file in files if file.exists()]


def read_piece(file: Path, offset: int) -> int:
    """Read a piece of a file; returns its number of bytes. A separate function, so that an injected fault can slow it down."""
    with file.open("rb", buffering=0) as stream:
        stream.seek(offset)
        return len(stream.read(PIECE))


@dataclass(frozen=True)
class Ceiling:
    """The storage's maximum read speed, bytes per second, and the number of concurrent streams that reaches it."""

    bytes_per_s: Estimate
    streams: int


def read_ceiling(files: Sequence[Path], repeats: int, seconds: float, until: float = NEVER) -> Ceiling:
    """The maximum read speed over several numbers of streams, reading the files in large pieces after dropping them from the page
    cache. seconds: time limit of each repeat. until: as in `in_turns`."""
    pieces = [(file, offset) for file in files for offset in range(0, file.stat().st_size, PIECE)]
    speeds: dict[int, list[float]] = {streams: [] for streams in STREAMS}

    def turn(streams: int) -> None:
        drop_pages(files)
        began = time.perf_counter()

        def read(piece: tuple[Path, int]) -> int:
            return read_piece(*piece) if time.perf_counter() - began < seconds else 0

        with ThreadPoolExecutor(streams) as pool:
            count = sum(pool.map(read, pieces))
        speeds[streams].append(count / (time.perf_counter() - began))

    in_turns(STREAMS, repeats, turn, "storage", until)
    found = {streams: Estimate.of_speeds(values) for streams, values in speeds.items()}
    best = max(found, key=lambda streams: found[streams].mean)
    return Ceiling(found[best], best)


def storage_bytes() -> int | None:
    """Bytes that the storage has delivered to this process so far; None if the kernel does not report them."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), None)


def cached_read_ms(mean_bytes: float, seconds: float = 0.1) -> float:
    """Milliseconds to read an image from a copy of its shard in memory, by seek and read as a `ShardSet` with a cache does."""
    image = np.empty(max(1, int(mean_bytes)), np.uint8)
    places = range(0, max(1, (64 << 20) - len(image)), max(1, len(image)))
    # A memory file like those of /dev/shm, which is often small in containers.
    with open(os.memfd_create("cropfeed"), "r+b", buffering=0) as stream:
        stream.write(bytes(64 << 20))
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            for place in places:
                stream.seek(place)
                stream.readinto(image.data)
            count += len(places)
        return 1e3 * (time.perf_counter() - began) / count
