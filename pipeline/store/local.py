"""Reads of local files. They are not mapped: if a mapped file is shortened or its disk fails, the kernel kills the process."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import threading
from io import FileIO
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import types

from ..errors import UserError
from ..jit import jit
from . import files
from .entries import Lazy
from .waiting import answer

_KEPT_OPEN = 1 << 14  # files
Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]

# Functions of the C library, called by compiled code. _FLAGS: 0 where they are missing or cannot tell what is cached.
_preadv2 = types.ExternalFunction("preadv2", types.int64(types.int32, types.uintp, types.int32, types.int64, types.int32))
_lseek = types.ExternalFunction("lseek", types.int64(types.int32, types.int64, types.int32))
_FLAGS = getattr(os, "RWF_NOWAIT", 0) if hasattr(ctypes.CDLL(None), "preadv2") else 0


class Parts(NamedTuple):
    """N parts of files, one after the other in data, uint8 (bytes,). ends: int64 (N,). ready: bool (N,), which ones were read."""

    data: Bytes
    ends: Ints
    ready: npt.NDArray[np.bool_]


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

    def read_cached(self, numbers: Ints, sizes: Ints, starts: Ints, counts: Ints) -> Parts | None:
        """Read parts of open files that are in the page cache, all in one call without the GIL. None where that is impossible.

        sizes: that the files must have. int64 (N,) each.
        """
        if not _FLAGS:
            return None
        streams = [self._open.get(number) for number in numbers.tolist()]  # holds them open
        descriptors = np.array([-1 if stream is None else stream.fileno() for stream in streams])
        ends = counts.cumsum()
        data, ready = np.empty(int(ends[-1]), np.uint8), np.empty(len(ends), np.bool_)
        read_descriptors(descriptors, sizes, starts, ends, _FLAGS, data, ready)
        data.setflags(write=False)  # as in `read_part`
        return Parts(data, ends, ready)


@jit
def read_descriptors(descriptors: Ints, sizes: Ints, starts: Ints, ends: Ints, flags: int, data: Bytes, ready: Any) -> None:
    """Read N parts of files into data, uint8 (bytes,), by preadv2 with flags.

    int64 (N,): file descriptors, or -1; sizes that the files must have; starts in the files; ends in data. ready: bool (N,),
    receives whether a part was read.
    """
    vector = np.empty(2, np.uint64)  # a struct iovec
    start = np.int64(0)
    for i in range(len(ends)):
        vector[0], vector[1] = data.ctypes.data + start, ends[i] - start
        ready[i] = (
            descriptors[i] >= 0
            and _lseek(descriptors[i], 0, 2) == sizes[i]  # from the end
            and _preadv2(descriptors[i], vector.ctypes.data, 1, starts[i], flags) == ends[i] - start
        )
        start = ends[i]


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
