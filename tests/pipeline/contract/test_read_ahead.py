"""Every engine has its images read from the disk before it needs them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import open_loader
from pipeline.store import local
from pipeline.store.shards import ShardSet
from tests.pipeline.contract.helpers import spec_for
from tests.pipeline.store.test_remote import wait_until

PAGE = 512  # bytes; fewer than an image has, so that images hardly share pages


class Disk:
    """A disk whose reads take 10 ms, unless the kernel was asked for all of their pages before. It counts the slow ones."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cached: set[tuple[str, int]] = set()
        self.advised: list[tuple[str, int, int]] = []
        self.reads: list[bool] = []  # whether each was slow
        self._preadv = os.preadv
        monkeypatch.setattr(os, "posix_fadvise", self.advise)
        monkeypatch.setattr(os, "preadv", self.read)
        monkeypatch.setattr(local, "_FLAGS", 0)  # no reads by the C library

    def advise(self, descriptor: int, start: int, count: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        self.advised.append((path, start, count))
        self.cached |= set(pages(path, start, count))

    def read(self, descriptor: int, buffers: Any, start: int, flags: int = 0) -> int:
        missing = set(pages(os.readlink(f"/proc/self/fd/{descriptor}"), start, len(buffers[0]))) - self.cached
        if missing and flags == os.RWF_NOWAIT:
            raise BlockingIOError
        self.reads.append(bool(missing))
        if missing:
            self.cached |= missing
            time.sleep(0.01)
        return self._preadv(descriptor, buffers, start)

    def contents(self) -> set[bytes]:
        """The bytes of all ranges that were asked for."""
        return {Path(path).read_bytes()[start : start + count] for path, start, count in self.advised}


def pages(path: str, start: int, count: int) -> Iterator[tuple[str, int]]:
    return ((path, page) for page in range(start // PAGE, (start + count - 1) // PAGE + 1))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def test_the_images_of_the_coming_batches_are_read_ahead(small: Path, engine: str, disk: Disk) -> None:
    """Those of the batch that was asked for, of those in progress, and of one more."""
    with open_loader(spec_for(small, engine, threads=2, prefetch=1)) as loader:
        batches = iter(loader)
        taken = [next(batches) for _ in range(3)]
        following = loader.order.samples(0, np.arange(24, 32))
        wanted = {loader.read(int(sample)).tobytes() for ids in (*(batch.ids for batch in taken), following) for sample in ids}
        wait_until(lambda: wanted <= disk.contents())
    if engine != "ffcv":  # which maps its file
        assert len(disk.reads) > 30
        assert sum(disk.reads) < len(disk.reads) / 2


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("cached", [False, True])
def test_what_is_read_ahead_is_what_is_read(small: Path, disk: Disk, tmp_path: Path, verify: bool, cached: bool) -> None:
    shards = ShardSet(small, "train", cache=tmp_path if cached else None, verify=verify)
    if cached:
        shards.read_ahead(np.zeros(1, np.int64)).result()
        assert not disk.advised  # as the cache is empty
        assert [len(shards.read(sum(shards.sizes[:shard]))) > 0 for shard in range(len(shards.sizes))]
    disk.cached.clear()
    shards.read_ahead(np.arange(len(shards))).result()
    disk.reads.clear()
    assert all(len(shards.read(sample)) for sample in range(len(shards)))
    assert disk.reads == [False] * len(shards)
    if not verify:
        stored = {shards.read(sample).tobytes() for sample in range(len(shards))}
        assert disk.contents() == stored


def test_cached_images_are_not_read_ahead(small: Path, disk: Disk) -> None:
    shards = ShardSet(small, "train")
    everything = np.arange(len(shards))
    shards.read_ahead(everything).result()
    asked = len(disk.advised)
    assert asked
    shards.read_ahead(everything).result()
    assert len(disk.advised) == asked
    disk.cached.clear()
    shards.read_ahead(everything).result()
    assert len(disk.advised) == 2 * asked
