"""Reads from remote storage that does not answer: a line, another attempt, and at last an error."""

from __future__ import annotations

import errno
import io
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from ..errors import UserError

LIMITS_S = (60.0, 120.0, 240.0)  # of the attempts: for 64 MB, a slow link may need minutes
NOTICE_S = 30.0  # between two lines
_PAUSE_S = 1.0  # after a lost connection
_LOST = (errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE, errno.ETIMEDOUT)
_LOST_NAMES = ("ServerDisconnectedError", "ClientPayloadError", "IncompleteReadError", "FSTimeoutError")  # of fsspec's back ends
log = logging.getLogger("cropfeed")

T = TypeVar("T")


def answer(path: str, call: Callable[[], T]) -> T:
    """The result of a call that reads from remote storage. It is repeated if it hangs or loses its connection.

    Each attempt runs in a daemon thread, which is left alone if it hangs: fsspec's back ends cannot be interrupted. Raises
    UserError if no attempt succeeds, and at once what the call raises for any other reason.
    """
    for number, limit in enumerate(LIMITS_S):
        if number:
            log.warning("%s: attempt %d of %d", path, number + 1, len(LIMITS_S))
        result: Future[T] = Future()
        threading.Thread(target=_run, args=(call, result), name="cropfeed-remote", daemon=True).start()
        if not _wait(path, result, limit):
            problem = f"no answer for {limit:.0f} s"
        elif (error := result.exception()) is None:
            return result.result()
        elif _is_lost(error):
            problem = f"the connection was lost ({type(error).__name__}: {error})"
            time.sleep(_PAUSE_S)
        else:
            raise error
        log.warning("%s: %s", path, problem)
    raise UserError(f"{path}: {problem}, after {len(LIMITS_S)} attempts", "check the network and the storage, then try again")


def _run(call: Callable[[], T], result: Future[T]) -> None:
    try:
        result.set_result(call())
    except BaseException as error:
        result.set_exception(error)


def _wait(path: str, result: Future[Any], limit: float) -> bool:
    """Wait for a result, with a line now and then. Returns whether it came."""
    began = time.monotonic()
    while (left := began + limit - time.monotonic()) > 0:
        if wait([result], min(NOTICE_S, left)).done:
            return True
        if left > NOTICE_S:
            log.warning("%s: no answer for %.0f s, still waiting", path, time.monotonic() - began)
    return False


def _is_lost(error: BaseException) -> bool:
    return isinstance(error, TimeoutError) or getattr(error, "errno", None) in _LOST or type(error).__name__ in _LOST_NAMES


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
