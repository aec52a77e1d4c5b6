"""Storage that does not answer: a line, another attempt, and at last an error. Threads that do not wait for it forever."""

from __future__ import annotations

import errno
import io
import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from typing import Any, Self, TypeVar

from ..errors import UserError

TIMEOUT_S = 60.0  # of the first attempt, by default
REQUESTS = 32  # to remote storage at a time, in a process: more slow each other down, and object stores refuse them
_TIMES = (1, 2, 4)  # the timeouts of the attempts: for 64 MB, a slow link may need minutes
_IDLE_S = 10.0  # how long a thread waits for its next call
NOTICE_S = 30.0  # between two lines
CLOSE_S = 2.0  # how long the end of a program may wait for threads
_PAUSE_S = 1.0  # after a lost connection
_LOST = (errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE, errno.ETIMEDOUT)
_LOST_NAMES = ("ServerDisconnectedError", "ClientPayloadError", "IncompleteReadError", "FSTimeoutError")  # of fsspec's back ends
log = logging.getLogger("cropfeed")

T = TypeVar("T")


_timeout = TIMEOUT_S
_idle: list[SimpleQueue[tuple[Future[Any], Callable[[], Any]]]] = []  # the threads that wait for a call
_said: dict[str, float] = {}  # when a line was last logged
os.register_at_fork(after_in_child=_idle.clear)


def set_timeout(seconds: float) -> None:
    """How long the first attempt of a read may take in this process; the others may take twice and four times as long."""
    global _timeout
    if not 0 < seconds < math.inf:
        raise UserError(f"`read_timeout` must be a positive number of seconds, not {seconds:g}")
    _timeout = seconds


def _warn(text: str, *arguments: object) -> None:
    """Log a line, unless another thread, which waits for the same, has just done that."""
    text = text % arguments
    now = time.monotonic()
    if now - _said.get(text, -math.inf) > _timeout / 2:
        _said[text] = now
        log.warning("%s", text)


def answer(path: str, call: Callable[[], T], moved: Callable[[], float] = lambda: 0.0, slack: float = 0.0) -> T:
    """The result of a call to storage. It is repeated if it hangs or loses its connection.

    moved: when (`time.monotonic`) the call last made progress. slack: additional seconds for an attempt.

    Each attempt runs in a daemon thread, which is left alone if it hangs: neither fsspec's back ends nor reads of a network file
    system can be interrupted. It costs about 25 us. Raises UserError if no attempt succeeds, and at once what the call raises for
    any other reason.
    """
    for number, times in enumerate(_TIMES):
        if number:
            _warn("%s: attempt %d of %d", path, number + 1, len(_TIMES))
        result, limit = _start(call), times * _timeout + slack
        if not _wait(path, result, limit, moved):
            problem = f"no answer for {limit:.0f} s"
        elif (error := result.exception()) is None:
            return result.result()
        elif _is_lost(error):
            problem = f"the connection was lost ({type(error).__name__}: {error})"
            time.sleep(_PAUSE_S)
        else:
            raise error
        _warn("%s: %s", path, problem)
    remedy = "check the network and the storage, then try again; for slow storage, raise `read_timeout`"
    raise UserError(f"{path}: {problem}, after {len(_TIMES)} attempts", remedy)


def _start(call: Callable[[], T]) -> Future[T]:
    """Run a call in an idle daemon thread, or in a new one."""
    result: Future[T] = Future()
    try:
        calls = _idle.pop()
    except IndexError:
        calls = SimpleQueue()
        threading.Thread(target=_serve, args=(calls,), name="cropfeed-storage", daemon=True).start()
    calls.put((result, call))
    return result


def _serve(calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]]]) -> None:
    while True:
        try:
            result, call = calls.get(timeout=_IDLE_S)
        except Empty:
            try:
                _idle.remove(calls)
            except ValueError:  # it was just taken for a call
                continue
            return
        _run(result, call, finished=lambda: _idle.append(calls))
        del result, call


def _run(result: Future[T], call: Callable[..., T], *arguments: Any, finished: Callable[[], object] = lambda: None) -> None:
    """finished: called before the result can be seen."""
    try:
        found = call(*arguments)
    except BaseException as error:
        finished()
        result.set_exception(error)
    else:
        finished()
        result.set_result(found)


def _wait(path: str, result: Future[Any], limit: float, moved: Callable[[], float]) -> bool:
    """Wait for a result, with a line now and then. Returns whether it came."""
    began = time.monotonic()
    while (idle := time.monotonic() - max(began, moved())) < limit:
        if idle > 0.9 * NOTICE_S:
            _warn("%s: no answer for %.0f s, still waiting", path, idle)
        with suppress(TimeoutError):  # an exception of the call itself is returned
            result.exception(min(NOTICE_S, limit - idle))
            return True
    return False


def _is_lost(error: BaseException) -> bool:
    return isinstance(error, TimeoutError) or getattr(error, "errno", None) in _LOST or type(error).__name__ in _LOST_NAMES


class Limit:
    """At most `count` requests at a time, of all threads."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._reset()
        os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        self._free, self._freed = self._count, threading.Condition()

    @contextmanager
    def of(self, requests: int) -> Iterator[None]:
        """A context in which so many requests may be made. Waits for those of other threads to end."""
        with self._freed:
            self._freed.wait_for(lambda: self._free >= requests)
            self._free -= requests
        try:
            yield
        finally:
            with self._freed:
                self._free += requests
                self._freed.notify_all()


class DaemonPool:
    """Daemon threads that run calls, up to `count` at a time. The threads begin with the first calls.

    Those of ThreadPoolExecutor are no daemons, so that one that waits for remote storage delays the end of the program.
    """

    def __init__(self, count: int, name: str = "cropfeed") -> None:
        self._count, self._name = count, name
        self._calls: SimpleQueue[tuple[Any, ...] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._finalizer = weakref.finalize(self, _close, self._calls, self._threads)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, call: Callable[..., T], *arguments: Any) -> Future[T]:
        """Run call(*arguments) in a thread."""
        if len(self._threads) < self._count:
            thread = threading.Thread(target=_work, args=(self._calls,), name=self._name, daemon=True)
            thread.start()
            self._threads.append(thread)
        result: Future[T] = Future()
        self._calls.put((result, call, *arguments))
        return result

    def close(self) -> None:
        """Drop the calls that have not begun, and wait for the others, but not long. Afterwards the pool is of no use."""
        self._finalizer()


def _work(calls: SimpleQueue[tuple[Any, ...] | None]) -> None:
    while (call := calls.get()) is not None:
        _run(*call)
        del call  # it may hold the last reference to a loader


def _close(calls: SimpleQueue[tuple[Any, ...] | None], threads: list[threading.Thread]) -> None:
    with suppress(Empty):
        while True:
            if call := calls.get_nowait():
                call[0].cancel()  # another thread may wait for it
    for _ in threads:
        calls.put(None)
    join(threads)


def join(threads: Iterable[threading.Thread]) -> None:
    """Wait for daemon threads to end, for up to `CLOSE_S` in all."""
    deadline = time.monotonic() + CLOSE_S
    for thread in threads:
        if thread is not threading.current_thread():  # a garbage collection in a thread can close its pool
            thread.join(max(0, deadline - time.monotonic()))


class RangeReader(io.RawIOBase):
    """A remote file as a seekable stream. read: (start, count) -> bytes. size: of the file, bytes."""

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        self._read, self._size, self._at = read, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        count = max(0, min(len(buffer), self._size - self._at))
        content = self._read(self._at, count) if count else b""
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)
