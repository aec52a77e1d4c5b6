"""Remote storage that hangs or loses its connection: lines, other attempts, and an error in the end."""

from __future__ import annotations

import errno
import hashlib
import io
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline import LoaderSpec, open_loader
from pipeline.errors import UserError
from pipeline.store import files, local, waiting
from pipeline.store.cache import ShardCache
from pipeline.store.prefetch import Prefetcher
from pipeline.store.shards import ShardSet
from tests.helpers import ROOT


class Unsteady(MemoryFileSystem):
    """Files in memory, whose first calls hang or fail. faults: called, one by one, before each call."""

    protocol = "unsteady"
    faults: list[Callable[[], object]] = []  # noqa: RUF012
    store: dict[str, Any] = {}  # noqa: RUF012
    moves = 0  # reports of an upload

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> Any:
        self._fault()
        return super().cat_file(path, start, end, **options)

    def info(self, path: str, **options: Any) -> Any:
        self._fault()
        return super().info(path, **options)

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        self._fault()
        return super().ls(path, detail, **options)

    def put_file(self, source: str, path: str, callback: Any = None, **options: Any) -> Any:
        self._fault()
        if self.moves:
            callback.set_size(self.moves)
            for _ in range(self.moves):
                time.sleep(0.04)
                callback.relative_update(1)
        return super().put_file(source, path, **options)

    def _fault(self) -> None:
        if self.faults:
            self.faults.pop(0)()


@pytest.fixture
def hang(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], object]]:
    """A fault: a call that hangs until the test ends. Attempts take 0.1, 0.2, 0.4 s, and there is a line every 0.06 s."""
    end = threading.Event()
    monkeypatch.setattr(waiting, "_timeout", 0.1)
    monkeypatch.setattr(waiting, "NOTICE_S", 0.06)
    monkeypatch.setattr(waiting, "_PAUSE_S", 0.01)
    fsspec.register_implementation("unsteady", Unsteady, clobber=True)
    Unsteady.faults = []
    files.write("unsteady://data/a/b.bin", bytes(range(256)) * 40)
    yield lambda: end.wait(30)
    end.set()
    Unsteady.faults = []


def lost() -> None:
    raise ConnectionResetError(104, "Connection reset by peer")


CALLS: dict[str, Callable[[], object]] = {
    "read": lambda: files.read("unsteady://data/a/b.bin", 3, 4),
    "size": lambda: files.size("unsteady://data/a/b.bin"),
    "list": lambda: files.list_folder("unsteady://data/a"),
    "exists": lambda: files.exists("unsteady://data/a/b.bin"),
    "is_folder": lambda: files.is_folder("unsteady://data/a"),
    "chunks": lambda: b"".join(files.read_chunks("unsteady://data/a/b.bin", 10240)),
    "sha256": lambda: files.sha256("unsteady://data/a/b.bin"),
    "write": lambda: files.write("unsteady://data/a/c.bin", b"content"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_hangs_is_repeated_with_a_line(
    name: str, hang: Callable[[], object], caplog: pytest.LogCaptureFixture
) -> None:
    expected = CALLS[name]()
    Unsteady.faults = [hang]
    assert CALLS[name]() == expected
    lines = [record.getMessage() for record in caplog.records]
    assert any(line.startswith("unsteady://data/a") and "no answer for" in line for line in lines), lines
    assert any(line.endswith("attempt 2 of 3") for line in lines), lines


@pytest.mark.parametrize("name", CALLS)
def test_storage_that_never_answers_is_an_error(name: str, hang: Callable[[], object], caplog: pytest.LogCaptureFixture) -> None:
    Unsteady.faults = [hang] * 3
    began = time.monotonic()
    with pytest.raises(UserError, match=r"^unsteady://data/a[^ ]*: no answer for 0 s, after 3 attempts; check the network"):
        CALLS[name]()
    assert 0.6 <= time.monotonic() - began < 5
    assert sum("still waiting" in record.getMessage() for record in caplog.records) >= 2


def test_a_slow_upload_that_moves_is_not_given_up(
    hang: Callable[[], object], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(waiting, "_TIMES", (2,))
    monkeypatch.setattr(waiting, "NOTICE_S", 0.2)
    monkeypatch.setattr(Unsteady, "moves", 12)
    files.write("unsteady://data/a/c.bin", b"content")
    assert files.read("unsteady://data/a/c.bin") == b"content"
    assert not caplog.records


def test_a_lost_connection_is_repeated(hang: Callable[[], object]) -> None:
    expected = CALLS["read"]()
    Unsteady.faults = [lost, lost]
    assert CALLS["read"]() == expected
    Unsteady.faults = [lost] * 3
    with pytest.raises(UserError, match=r"the connection was lost \(ConnectionResetError: .*after 3 attempts"):
        CALLS["read"]()


def test_other_errors_are_not_repeated(hang: Callable[[], object], caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UserError, match="unsteady://data/none: not found"):
        files.read("unsteady://data/none")
    assert not caplog.records


def test_a_download_that_hangs_is_repeated(hang: Callable[[], object], tmp_path: Path) -> None:
    content = files.read("unsteady://data/a/b.bin")
    Unsteady.faults = [hang, lambda: None, hang]
    sha256 = hashlib.sha256(content).hexdigest()
    with ShardCache(tmp_path, 10**6).open("unsteady://data/a/b.bin", len(content), sha256) as stream:
        assert stream.read() == content
    assert not Unsteady.faults


def test_closing_does_not_wait_for_a_fetch_that_hangs(hang: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "CLOSE_S", 0.05)
    begun = threading.Event()

    def fetch(number: int, stop: threading.Event) -> None:
        begun.set()
        hang()

    prefetcher = Prefetcher(fetch)
    prefetcher.request([0])
    assert begun.wait(10)
    began = time.monotonic()
    prefetcher.close()
    assert time.monotonic() - began < 5


WAITING = """
import sys
sys.path.insert(0, sys.argv[1])
from pipeline.cli import run_cli
from pipeline.engines.pool import WorkerPool
from pipeline.store import files
def main():
    pool = WorkerPool(2, 1, object, lambda worker, url, indices: files.read(url))
    try:
        pool.submit(sys.argv[2], 5)
        pool.next()
    finally:
        pool.close()
run_cli(main)
"""


@pytest.mark.slow
def test_ctrl_c_does_not_wait_for_threads_whose_storage_never_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/data"
        command = [sys.executable, "-c", WAITING, str(ROOT), url]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            server.accept()
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=waiting.CLOSE_S + 20)[1] == "interrupted\n"  # an attempt takes 60 s
            assert process.returncode == 130


def test_remote_tars_are_read_member_by_member(hang: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "CHUNK", 700)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name in "abc":
            member = tarfile.TarInfo(name)
            member.size = 2000
            tar.addfile(member, io.BytesIO(name.encode() * 2000))
    files.write("unsteady://data/c.tar", stream.getvalue())
    with files.open_binary("unsteady://data/c.tar") as remote:
        assert remote.seek(-3, io.SEEK_END) == len(stream.getvalue()) - 3
        assert len(remote.read()) == 3
        remote.seek(0)
        Unsteady.faults = [lambda: None, hang]
        with tarfile.open(fileobj=remote) as tar:
            found = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert found == {name: name.encode() * 2000 for name in "abc"}


def test_calls_that_a_closed_pool_drops_are_cancelled() -> None:
    """A thread that waits for one would wait forever."""
    both = threading.Barrier(2)
    pool = waiting.DaemonPool(1)
    first, second = pool.submit(both.wait, 10), pool.submit(int)
    while not both.n_waiting:
        time.sleep(0.001)
    closing = threading.Thread(target=pool.close)
    closing.start()
    with pytest.raises(CancelledError):
        second.result(10)
    both.wait(10)
    closing.join(10)
    assert first.done()


# --- Local files, such as those of a network file system


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts take 0.05, 0.1 and 0.2 s."""
    monkeypatch.setattr(waiting, "_timeout", 0.05)


def test_a_local_file_that_never_answers_is_named(impatient: None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A pipe without a writer, which blocks a thread in the kernel when it is opened."""
    os.mkfifo(tmp_path / "a.bin")
    with pytest.raises(UserError, match=rf"^{tmp_path}/a.bin: no answer for 0 s, after 3 attempts; check .*`read_timeout`$"):
        files.read(str(tmp_path / "a.bin"))
    assert sum("attempt" in record.getMessage() for record in caplog.records) == 2
    release(tmp_path / "a.bin")


def release(pipe: Path) -> None:
    """End the threads that wait for a writer."""
    os.close(os.open(pipe, os.O_RDWR | os.O_NONBLOCK))


@pytest.mark.parametrize("order", ["full", "blocks"])
def test_a_loader_names_a_shard_that_never_answers(
    small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    monkeypatch.setattr(waiting, "CLOSE_S", 0.05)
    shutil.copytree(small_shards, tmp_path / "data")
    shard = tmp_path / "data" / "train" / "000001.tar"
    shard.unlink()
    os.mkfifo(shard)
    spec = LoaderSpec(tmp_path / "data", batch_size=8, image_size=32, order=order, block_shards=1, threads=2, read_timeout=0.05)
    began = time.monotonic()
    with open_loader(spec) as loader, pytest.raises(UserError, match=rf"^{shard}: no answer for 0 s, after 3 attempts"):
        list(loader)
    assert time.monotonic() - began < 10
    release(shard)


def test_a_local_read_that_hangs_is_repeated(
    impatient: None, small_shards: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stored, read, end = ShardSet(small_shards, "train"), os.preadv, threading.Event()
    expected = stored.read(20).tobytes()
    faults = [lambda: end.wait(30), lambda: end.wait(30)]

    def hanging(stream: int, buffers: Any, start: int, flags: int = 0) -> int:
        if flags:  # what a network file system says to RWF_NOWAIT
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        if faults:
            faults.pop()()
        return read(stream, buffers, start)

    monkeypatch.setattr(os, "preadv", hanging)
    assert stored.read(20).tobytes() == expected
    assert [record.getMessage() for record in caplog.records if "attempt" in record.getMessage()] == [
        f"{small_shards}/train/000001.tar: attempt {number} of 3" for number in (2, 3)
    ]
    end.set()


def test_what_is_in_memory_is_read_without_another_thread(small_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = ShardSet(small_shards, "train")
    expected = stored.read(20).tobytes()
    monkeypatch.setattr(local, "answer", lambda path, call: pytest.fail("asked a thread"))
    assert stored.read(20).tobytes() == expected


def test_the_time_out_is_checked(small_shards: Path) -> None:
    for seconds in (0, -1, math.inf, math.nan):
        with pytest.raises(UserError, match="`read_timeout` must be a positive number of seconds"):
            open_loader(LoaderSpec(small_shards, read_timeout=seconds))


def test_threads_serve_one_call_after_another() -> None:
    threads = {waiting.answer("a", threading.get_ident) for _ in range(20)}
    assert len(threads) <= 2  # the second, if a call came before the first thread was idle
    assert len({waiting.answer("a", lambda: waiting.answer("b", threading.get_ident)) for _ in range(20)}) <= 3


@pytest.mark.parametrize("threads", [1, 24])
def test_requests_at_a_time_are_limited(hang: Callable[[], object], monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    """A download of several chunks counts as many requests."""
    monkeypatch.setattr(files, "_limit", waiting.Limit(10))
    monkeypatch.setattr(files, "CHUNK", 1000)
    monkeypatch.setattr(waiting, "_timeout", 10)
    running, most, lock = 0, 0, threading.Lock()

    def count(ranges: int) -> None:
        nonlocal running, most
        with lock:
            running += ranges
            most = max(most, running)
        time.sleep(0.002)
        with lock:
            running -= ranges

    def cat_file(self: Unsteady, *arguments: Any, **options: Any) -> Any:
        count(1)
        return MemoryFileSystem.cat_file(self, *arguments, **options)

    def cat_ranges(self: Unsteady, paths: list[str], starts: list[int], ends: list[int]) -> list[Any]:
        count(len(paths))
        return [MemoryFileSystem.cat_file(self, *one) for one in zip(paths, starts, ends, strict=True)]

    monkeypatch.setattr(Unsteady, "cat_file", cat_file)
    monkeypatch.setattr(Unsteady, "cat_ranges", cat_ranges)

    def read(number: int) -> bytes:
        url = "unsteady://data/a/b.bin"
        return b"".join(files.read_chunks(url, 10240)) if number % 2 else files.read(url)

    with waiting.DaemonPool(threads) as pool:
        found = [pool.submit(read, number) for number in range(24)]
        assert {one.result(30) for one in found} == {bytes(range(256)) * 40}
    assert most > (8 if threads > 1 else 0)
    assert most <= 10
