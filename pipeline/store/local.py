"""Reads of local files. They are not mapped: if a mapped file is shortened or its disk fails, the kernel kills the process."""

from __future__ import annotations

import errno
import os
import resource
import threading
from io import FileIO

import numpy as np
import numpy.typing as npt

from ..errors import UserError
from . import files
from .entries import Lazy
from .waiting import answer

_KEPT_OPEN = 1 << 14  # files
Bytes = npt.NDArray[np.uint8]


class LocalFiles:
    """Local files, by number. Thousands stay open, as opening takes longer than reading on network file systems. Thread-safe."""

    def __init__(self, paths: Lazy[str]) -> None:
        self._paths = paths
        self._open: dict[int, FileIO] = {}
        self._lock = threading.Lock()  # guards changes
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        self._most = _KEPT_OPEN if hard == resource.RLIM_INFINITY else min(_KEPT_OPEN, hard // 2)

    def open(self, number: int) -> FileIO:
        stream = self._open.get(number)
        if stream is None:
            with files.explained(self._paths[number]):
                stream = _open(self._paths[number])
            with self._lock:
                stream = self._open.setdefault(number, stream)
                if len(self._open) > self._most:  # a reader of the oldest one holds it open
                    del self._open[next(iter(self._open))]
        return stream

    def read(self, number: int, size: int, start: int, count: int) -> Bytes:
        """As `read_part`. A thread that can be left alone waits for the disk, if the page cache does not have all the bytes."""
        stream, path = self._open.get(number), self._paths[number]
        ready = read_cached(stream, start, count) if stream else None
        if stream and ready is not None and os.fstat(stream.fileno()).st_size == size:
            return ready
        return answer(path, lambda: read_part(self.open(number), path, size, start, count))


def _open(path: str) -> FileIO:
    """Open one more file. The usual limit of a process, 1024, is less than ImageNet's 1282 shards, and is raised if need be."""
    try:
        return FileIO(path)
    except OSError as error:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if error.errno != errno.EMFILE or soft == hard:
            raise
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        return FileIO(path)


def read_cached(stream: FileIO, start: int, count: int) -> Bytes | None:
    """Bytes of a file if the page cache has all of them. None if not, or where the system or the file system cannot tell."""
    content = np.empty(count, np.uint8)
    try:
        got = os.preadv(stream.fileno(), [content.data], start, os.RWF_NOWAIT)
    except (OSError, AttributeError):
        return None
    content.setflags(write=False)  # as in `read_part`
    return content if got == count else None


def read_part(stream: FileIO, path: str, size: int, start: int, count: int) -> Bytes:
    """Bytes of a local file: uint8 (count,). size: the size that it must have. path: its name in messages."""
    content, done = np.empty(count, np.uint8), 0
    with files.explained(path):
        found = os.fstat(stream.fileno()).st_size
        while found == size and done < count:
            got = os.preadv(stream.fileno(), [content.data[done:]], start + done)
            done, found = done + got, found if got else start + done
    if found != size:
        raise UserError(f"{path}: has {found} bytes, manifest.json says {size}", "restore the file, or make the shards again")
    content.setflags(write=False)  # numba compiles code for read-only arrays anew: here it is always that code, as in `warm_up`
    return content
