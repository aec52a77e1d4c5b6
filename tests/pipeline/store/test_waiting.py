"""Remote storage that hangs or loses its connection: lines, other attempts, and an error in the end."""

from __future__ import annotations

import hashlib
import io
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

from pipeline.errors import UserError
from pipeline.store import files, waiting
from pipeline.store.cache import ShardCache
from pipeline.store.prefetch import Prefetcher
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
    """A fault: a call that hangs until the test ends. An attempt takes 0.1, 0.2, 0.3 s, and there is a line every 0.06 s."""
    end = threading.Event()
    monkeypatch.setattr(waiting, "LIMITS_S", (0.1, 0.2, 0.3))
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
    monkeypatch.setattr(waiting, "LIMITS_S", (0.2,))
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
    path = ShardCache(tmp_path, 10**6).fetch("unsteady://data/a/b.bin", len(content), hashlib.sha256(content).hexdigest())
    assert path.read_bytes() == content
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
