"""Planted faults, and measurements of the storage."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.spec import LoaderSpec
from pipeline.store.shards import ShardSet
from tools.profiler import storage
from tools.profiler.planted import Planted, Throttle, slow_reader

# --- Planted faults


@pytest.mark.parametrize(
    ("text", "kind", "amount"), [("reader=20", "reader", 20.0), ("model=2.5", "model", 2.5), ("threads=1", "threads", 1.0)]
)
def test_faults_are_parsed(text: str, kind: str, amount: float) -> None:
    planted = Planted.parse(text)
    assert planted == Planted(kind, amount)
    assert text.split("=")[1] in str(planted)


@pytest.mark.parametrize(
    "text",
    ["reader", "reader=", "reader=fast", "reader=0", "reader=-1", "reader=inf", "reader=nan", "threads=1.5", "disk=3", "=3"],
)
def test_unknown_faults_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"is not one of reader=MB/S, model=MS, threads=N"):
        Planted.parse(text)


def test_all_threads_together_are_throttled() -> None:
    """400 kB at 1 MB/s, from four threads. A pause before does not count."""
    throttle = Throttle(1e6)
    time.sleep(0.1)
    began = time.perf_counter()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(throttle.wait_for, [10_000] * 40))
    assert 0.4 <= time.perf_counter() - began < 0.6


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of bytes passed to a throttle, in order; it does not wait."""
    counts: list[int] = []
    monkeypatch.setattr(Throttle, "wait_for", lambda self, count: counts.append(count))
    return counts


def test_a_slow_reader_does_not_slow_down_cached_copies(small_shards: Path, tmp_path: Path, passed: list[int]) -> None:
    plain, cached = ShardSet(small_shards, "train"), ShardSet(small_shards, "train", tmp_path)
    numbers = [5, 0, 59]
    with slow_reader(20):
        slow = [plain.read(number).tobytes() for number in numbers]
        assert passed == [len(image) for image in slow]
        assert [cached.read(number).tobytes() for number in numbers] == slow
        tar = plain.shards[0]
        assert storage.read_piece(tar, 100) == tar.stat().st_size - 100
        assert passed[3:] == [tar.stat().st_size - 100]
    assert [plain.read(number).tobytes() for number in numbers] == slow
    storage.read_piece(tar, 0)
    assert len(passed) == 4  # the patch is undone


def test_an_error_ends_a_slow_reader(small_shards: Path, passed: list[int]) -> None:
    with pytest.raises(UserError), slow_reader(20):
        raise UserError("any")
    ShardSet(small_shards, "train").read(0)
    assert passed == []


def test_maximum_read_speed_of_a_slow_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PIECE", 100_000)
    (tmp_path / "file").write_bytes(bytes(2_000_000))
    with slow_reader(20):
        found = storage.read_ceiling([tmp_path / "file"], 2, 10)
    assert 13e6 < found.bytes_per_s.mean <= 20e6


# --- Storage


def test_read_ceiling_reads_everything_once_per_repeat(small_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = storage.local_files(LoaderSpec(small_shards))
    monkeypatch.setattr(storage, "PIECE", 10_000)
    read: Counter[tuple[Path, int]] = Counter()
    dropped: list[list[Path]] = []
    plain_read, plain_drop = storage.read_piece, storage.drop_pages

    def counted(file: Path, offset: int) -> int:
        read[file, offset] += 1
        return plain_read(file, offset)

    def noted(some: list[Path]) -> None:
        dropped.append(some)
        plain_drop(some)

    monkeypatch.setattr(storage, "read_piece", counted)
    monkeypatch.setattr(storage, "drop_pages", noted)
    found = storage.read_ceiling(files, 3, 10)
    turns = 3 * len(storage.STREAMS)
    assert dropped == [files] * turns
    assert read == Counter({(file, at): turns for file in files for at in range(0, file.stat().st_size, 10_000)})
    assert 0 < found.bytes_per_s.mean < 1e12
    assert found.streams in storage.STREAMS
    assert storage.read_ceiling(files, 2, 0).bytes_per_s.mean == 0  # in no time, nothing is read


def test_dropped_pages_come_from_the_storage(tmp_path: Path) -> None:
    def delivered(file: Path) -> int:
        before = storage.storage_bytes() or 0
        assert storage.read_piece(file, 0) == 1 << 20
        return (storage.storage_bytes() or 0) - before

    for name in ("dropped", "control"):
        (tmp_path / name).write_bytes(bytes(1 << 20))
    with (tmp_path / "control").open("rb") as stream:  # whether this file system drops pages at all
        os.sync()
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if delivered(tmp_path / "control") == 0:
        pytest.skip("this file system keeps its pages, or the kernel does not report reads")
    (tmp_path / "dropped").write_bytes(bytes(1 << 20))  # dirty pages
    storage.drop_pages([tmp_path / "dropped"])
    assert delivered(tmp_path / "dropped") >= 1 << 20
    assert delivered(tmp_path / "dropped") < 1 << 18


def test_local_files_are_the_tars_and_the_beton(small_shards: Path, tmp_path: Path) -> None:
    def names(spec: LoaderSpec) -> list[str]:
        return [str(file.relative_to(spec.data)) for file in storage.local_files(spec)]

    assert names(LoaderSpec(small_shards)) == [f"train/{number:06d}.tar" for number in range(4)]
    assert names(LoaderSpec(small_shards, "val")) == ["val/000000.tar", "val/000001.tar"]
    (tmp_path / "train").symlink_to(small_shards / "train")
    (tmp_path / "train.beton").write_bytes(b"")
    manifest = json.loads((small_shards / "manifest.json").read_text())
    manifest["splits"]["train"]["beton"] = {
        "file": "train.beton",
        "sha256": "0",
        "settings": {"mode": "region", "max_resolution": None},
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert names(LoaderSpec(tmp_path))[3:] == ["train/000003.tar", "train.beton"]
    spec = LoaderSpec(small_shards, cache=tmp_path / "cache")
    assert storage.local_files(spec) == []  # not cached yet
    shards = ShardSet(small_shards, "train", spec.cache)
    shards.read(0)
    assert storage.local_files(spec) == [shards.shards[0]]


def test_read_time_from_memory_grows_with_size() -> None:
    small, large = (min(storage.cached_read_ms(size, 0.05) for _ in range(3)) for size in (100e3, 1e6))
    assert 0 < 3 * small < large < 40 * small
    assert large < 20  # 50 MB/s
