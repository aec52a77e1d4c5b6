"""The file cache: its limit, its checks, concurrent processes, and SIGKILL."""

from __future__ import annotations

import fcntl
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from pipeline.errors import UserError
from pipeline.store import files
from pipeline.store.cache import ShardCache, choose_cache
from tests.helpers import ROOT

BYTES = 40_000

# A process that fetches files, given as URLs, one after another and checks each. It logs every download as a line in $LOG.
# A download yields half of a file, sleeps for $PAUSE seconds, then yields the rest.
WORKER = """
import hashlib, os, random, sys, time
from pathlib import Path
from pipeline.store import files
from pipeline.store.cache import ShardCache

def read_chunks(url, count):
    with open(os.environ["LOG"], "a") as log:
        log.write(url + "\\n")
    content = files.read(url)
    yield content[:count // 2]
    time.sleep(float(os.environ["PAUSE"]))
    yield content[count // 2:]

files.read_chunks = read_chunks
cache = ShardCache(Path(sys.argv[1]), int(sys.argv[2]))
for url in sys.argv[3:]:
    content = files.read(url)
    with cache.open(url, len(content), hashlib.sha256(content).hexdigest()) as stream:
        assert stream.read() == content
"""


class Source(NamedTuple):
    url: str
    bytes: int
    sha256: str


@pytest.fixture
def sources(tmp_path: Path) -> list[Source]:
    """Eight files of 40,000 bytes."""
    found = []
    for index in range(8):
        content = bytes([index]) * BYTES
        path = tmp_path / f"{index}.tar"
        path.write_bytes(content)
        found.append(Source(str(path), BYTES, hashlib.sha256(content).hexdigest()))
    return found


def fetch(cache: ShardCache, url: str, count: int, sha256: str) -> Path:
    cache.open(url, count, sha256).close()
    return cache.path(sha256)


def held(folder: Path) -> set[str]:
    """The names of all files in the cache, without its lock."""
    return {path.name for path in folder.iterdir()} - {".lock"}


def start_worker(folder: Path, limit: int, urls: list[str], log: Path, pause: float) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(folder), str(limit), *urls],
        cwd=ROOT,
        env=os.environ | {"LOG": str(log), "PAUSE": str(pause)},
        stderr=subprocess.PIPE,
    )


def used_bytes(folder: Path) -> int:
    """The bytes in the folder, counted while nothing is added or removed."""
    with (folder / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return sum(path.stat().st_size for path in folder.iterdir())


def test_a_file_is_downloaded_once_and_unchanged(tmp_path: Path, sources: list[Source], downloads: list[str]) -> None:
    cache = ShardCache(tmp_path / "deep" / "cache", 10 * BYTES)
    for _ in range(3):
        path = fetch(cache, *sources[3])
        assert path.read_bytes() == Path(sources[3].url).read_bytes()
    assert downloads == [sources[3].url]
    assert held(cache.folder) == {sources[3].sha256}


def test_files_are_fetched_from_any_file_system(tmp_path: Path, sources: list[Source], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "CHUNK", 1000)  # many chunks in several rounds, and a shorter last one
    content = os.urandom(BYTES + 17)
    files.write("memory://bucket/a.tar", content)
    cache = ShardCache(tmp_path / "cache", 10 * BYTES)
    path = fetch(cache, "memory://bucket/a.tar", len(content), hashlib.sha256(content).hexdigest())
    assert path.read_bytes() == content


def test_least_recently_used_files_are_evicted_first(tmp_path: Path, sources: list[Source], downloads: list[str]) -> None:
    cache = ShardCache(tmp_path / "cache", 3 * BYTES + 100)
    for age, source in enumerate(sources[:3]):
        path = fetch(cache, *source)
        os.utime(path, (1000 + age, 1000 + age))
    fetch(cache, *sources[0])  # used again, so the others are older now
    fetch(cache, *sources[3])
    assert held(cache.folder) == {sources[i].sha256 for i in (0, 2, 3)}
    fetch(cache, *sources[4])
    assert held(cache.folder) == {sources[i].sha256 for i in (0, 3, 4)}
    assert used_bytes(cache.folder) == 3 * BYTES
    assert downloads == [sources[i].url for i in (0, 1, 2, 3, 4)]


def test_an_open_file_outlives_its_eviction(tmp_path: Path, sources: list[Source]) -> None:
    cache = ShardCache(tmp_path / "cache", BYTES)
    with cache.open(*sources[1]) as stream:
        fetch(cache, *sources[2])
        assert held(cache.folder) == {sources[2].sha256}
        assert stream.read() == b"\1" * BYTES


def test_pinned_files_are_not_evicted(tmp_path: Path, sources: list[Source]) -> None:
    cache = ShardCache(tmp_path / "cache", 2 * BYTES)
    with cache.open_pinned(*sources[0]):
        os.utime(cache.path(sources[0].sha256), (0, 0))
        for source in sources[1:4]:
            fetch(cache, *source)
        assert held(cache.folder) == {sources[0].sha256, sources[3].sha256}
        with (
            cache.open_pinned(*sources[3]),
            pytest.raises(UserError, match=r"4\.tar: .*beside the files in use.*raise `cache_gb`"),
        ):
            fetch(cache, *sources[4])
    fetch(cache, *sources[4])
    fetch(cache, *sources[5])
    assert held(cache.folder) == {sources[4].sha256, sources[5].sha256}


def test_a_file_larger_than_the_cache_is_refused(tmp_path: Path, sources: list[Source], downloads: list[str]) -> None:
    cache = ShardCache(tmp_path / "cache", BYTES - 1)
    with pytest.raises(UserError, match=r"0\.tar: its 4e-05 GB do not fit .* raise `cache_gb`"):
        fetch(cache, *sources[0])
    assert not downloads


def test_a_wrong_checksum_is_retried_once(tmp_path: Path, sources: list[Source], monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [b"\7" * BYTES, b"\0" * BYTES]  # the first is wrong
    monkeypatch.setattr(files, "read_chunks", lambda url, count: iter([answers.pop(0)]))
    cache = ShardCache(tmp_path / "cache", 10 * BYTES)
    assert fetch(cache, *sources[0]).read_bytes() == b"\0" * BYTES
    answers += [b"\7" * BYTES] * 3
    with pytest.raises(UserError, match=r"1\.tar: its SHA-256 is not the one in manifest.json"):
        fetch(cache, *sources[1])
    assert len(answers) == 1
    assert held(cache.folder) == {sources[0].sha256}


def test_a_file_of_another_size_is_refused_before_it_is_downloaded(
    tmp_path: Path, sources: list[Source], downloads: list[str]
) -> None:
    cache = ShardCache(tmp_path / "cache", 10 * BYTES)
    Path(sources[0].url).write_bytes(b"\0" * 100)
    with pytest.raises(UserError, match=r"0\.tar: has 100 bytes, manifest.json says 40000"):
        fetch(cache, *sources[0])
    Path(sources[0].url).unlink()
    with pytest.raises(UserError, match=r"0\.tar: not found"):
        fetch(cache, *sources[0])
    assert not downloads
    assert not held(cache.folder)


def test_a_damaged_copy_is_downloaded_again(tmp_path: Path, sources: list[Source], downloads: list[str]) -> None:
    cache = ShardCache(tmp_path / "cache", 10 * BYTES)
    fetch(cache, *sources[0]).write_bytes(b"short")
    assert fetch(cache, *sources[0]).read_bytes() == b"\0" * BYTES
    assert len(downloads) == 2


def test_an_unusable_folder_is_named(tmp_path: Path, sources: list[Source]) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"file/cache: the cache cannot be used .* give another `cache`"):
        fetch(ShardCache(tmp_path / "file" / "cache", BYTES), *sources[0])


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path, sources: list[Source], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    cache = ShardCache(tmp_path / "cache", BYTES)
    with pytest.raises(UserError, match=r"cache: the cache cannot be used \(.*No space left"):
        fetch(cache, *sources[0])
    assert not held(cache.folder)


def test_concurrent_processes_download_a_file_once(tmp_path: Path, sources: list[Source]) -> None:
    log = tmp_path / "log"
    workers = [start_worker(tmp_path / "cache", 10 * BYTES, [sources[5].url], log, 1.0) for _ in range(3)]
    for worker in workers:
        assert worker.wait(60) == 0, worker.communicate()
    assert log.read_text().splitlines() == [sources[5].url]


def test_processes_together_never_exceed_the_limit(tmp_path: Path, sources: list[Source]) -> None:
    """Three processes read eight files in different orders; two and a half fit into the cache."""
    folder, limit = tmp_path / "cache", BYTES * 5 // 2
    folder.mkdir()
    urls = [source.url for source in sources]
    orders = [urls, urls[::-1], urls[3:] + urls[:3]]
    workers = [start_worker(folder, limit, 2 * order, tmp_path / f"log{i}", 0.01) for i, order in enumerate(orders)]
    most = 0
    while any(worker.poll() is None for worker in workers):
        most = max(most, used_bytes(folder))
        time.sleep(0.002)
    assert all(worker.wait(60) == 0 for worker in workers), [worker.communicate() for worker in workers]
    assert 2 * BYTES <= most <= limit
    assert len(held(folder)) == 2


def test_the_partial_file_of_a_killed_download_is_not_used(tmp_path: Path, sources: list[Source], downloads: list[str]) -> None:
    cache = ShardCache(tmp_path / "cache", 2 * BYTES)
    for wanted, other in ((sources[0], sources[0]), (sources[1], sources[2])):  # the next fetch: the same file, or another one
        worker = start_worker(cache.folder, cache.limit, [wanted.url], tmp_path / "log", 1000)
        partial = cache.folder / f".{wanted.sha256}.{BYTES}.partial"
        deadline = time.monotonic() + 60
        while not (tmp_path / "log").exists() or wanted.url not in (tmp_path / "log").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert partial.exists()
        worker.send_signal(signal.SIGKILL)
        worker.communicate()
        assert partial.exists()
        assert not cache.path(wanted.sha256).exists()
        assert fetch(cache, *other).read_bytes() == Path(other.url).read_bytes()
        assert not partial.exists()
    assert downloads == [sources[0].url, sources[2].url]


def test_a_waiting_process_takes_over_a_killed_download(tmp_path: Path, sources: list[Source]) -> None:
    log = tmp_path / "log"
    first = start_worker(tmp_path / "cache", BYTES, [sources[0].url], log, 1000)
    while not log.exists():
        time.sleep(0.01)
    second = start_worker(tmp_path / "cache", BYTES, [sources[0].url], log, 0)
    time.sleep(1)
    assert second.poll() is None
    first.kill()
    first.communicate()
    assert second.wait(60) == 0, second.communicate()
    assert log.read_text().splitlines() == [sources[0].url] * 2


def test_options_override_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CROPFEED_CACHE", raising=False)
    monkeypatch.delenv("CROPFEED_CACHE_GB", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    default = choose_cache()
    status = os.statvfs(tmp_path)
    assert default.folder == tmp_path / ".cache" / "cropfeed"
    assert default.limit == pytest.approx(0.8 * status.f_bavail * status.f_frsize, rel=0.1)
    monkeypatch.setenv("CROPFEED_CACHE", str(tmp_path / "there"))
    monkeypatch.setenv("CROPFEED_CACHE_GB", "1.5")
    assert choose_cache() == ShardCache(tmp_path / "there", 1_500_000_000)
    assert choose_cache(tmp_path / "here", 2) == ShardCache(tmp_path / "here", 2_000_000_000)
    for wrong in ("0", "-1", "nan", "inf", "much"):
        monkeypatch.setenv("CROPFEED_CACHE_GB", wrong)
        with pytest.raises(UserError, match=f"positive number of gigabytes, not {wrong}"):
            choose_cache()
    with pytest.raises(UserError, match="not 0"):
        choose_cache(None, 0)
