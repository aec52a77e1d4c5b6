"""Background threads that fetch shards, or parts of them, before they are needed, and the bar of the downloads."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Generic, TypeVar

from ..progress import SharedBar
from .cache import ShardCache
from .entries import Entries, Lazy
from .local import read_cached
from .waiting import DaemonPool, join

_THREADS = 4
_PIECE = 8 << 20  # bytes that are read ahead before a thread looks whether it has to stop
# Linux reads only the first bytes of a longer range: as many as the disk's read_ahead_kb, by default 128 KiB, or its largest
# request.
_ADVISED = 128 << 10
# Ranges of a request that are looked at. If all are cached, none is read ahead: that would cost 50 us of CPU time an image.
_PROBES = 4

Item = TypeVar("Item", bound=Hashable)
Fetch = Callable[[Item, threading.Event], None]
Ranges = Iterable[tuple[int, int, int]]  # of files: number of the file, first byte, count of bytes


class Prefetcher(Generic[Item]):
    """Calls `fetch(item, stop)` for requested items in a few threads.

    fetch must return or raise soon after `stop` is set. Its errors are ignored, as a later read of the item raises them again.
    Threads end when the queue is empty, so a loader that is not closed leaves no threads behind. They are daemon threads, so a
    program that does not close the loader does not wait for downloads at exit.
    """

    def __init__(self, fetch: Fetch[Item], threads: int = _THREADS) -> None:
        self._fetch, self._limit = fetch, threads
        self._lock = threading.Lock()  # guards the attributes below
        self._queue: deque[Item] = deque()
        self._requested: set[Item] = set()  # queued or being fetched
        self._threads: set[threading.Thread] = set()
        self._stop = threading.Event()

    def request(self, items: Iterable[Item]) -> None:
        """Fetch these items, in this order, except those that are already queued or being fetched."""
        with self._lock:
            for item in items:
                if item not in self._requested:
                    self._requested.add(item)
                    self._queue.append(item)
            while len(self._threads) < min(self._limit, len(self._requested)):
                thread = threading.Thread(target=self._run, name="cropfeed-prefetch", daemon=True)
                thread.start()
                self._threads.add(thread)

    def close(self) -> None:
        """Stop fetching and end the threads, those that hang later. A later request starts new ones, even if this call was
        interrupted."""
        with self._lock:
            self._requested.difference_update(self._queue)
            self._queue.clear()
            self._stop.set()
            self._stop = threading.Event()  # for later requests
            threads = list(self._threads)
        join(threads)

    def _run(self) -> None:
        while (work := self._next()) is not None:
            with suppress(Exception):
                self._fetch(*work)
            with self._lock:
                self._requested.discard(work[0])

    def _next(self) -> tuple[Item, threading.Event] | None:
        """The next item and the event that stops its fetch; None ends the thread."""
        with self._lock:
            if self._queue:
                return self._queue.popleft(), self._stop
            self._threads.discard(threading.current_thread())
            return None


class ReadAhead:
    """Asks the kernel, in a background thread, to read parts of local files into the page cache. Without effect where the
    operating system cannot be asked.

    open: the file of a number. Its errors are ignored, as reading the file raises them again.
    """

    def __init__(self, open: Callable[[int], FileIO]) -> None:
        self._open = open
        self._thread: DaemonPool | None = None

    def request(self, find: Callable[[], Ranges]) -> Future[None]:
        """Read ranges ahead, in their order. find: is called in the background, to keep the caller no longer than 10 us."""
        # One thread, so that ranges are read in the order of requests. It stays, as starting one takes 100 us.
        self._thread = self._thread or DaemonPool(1)
        return self._thread.submit(self._advise, find)

    def close(self) -> None:
        """Drop the requests and end the thread. A later request starts a new one."""
        thread, self._thread = self._thread, None
        if thread:
            thread.close()

    def _advise(self, find: Callable[[], Ranges]) -> None:
        ranges = list(find())
        with suppress(Exception):
            probed = ranges[:: -(-len(ranges) // _PROBES)]
            if all(read_cached(self._open(file), start, 1) is not None for file, start, _ in probed):
                return
        for file, start, count in ranges:
            with suppress(Exception):
                will_need(self._open(file), start, count)


def will_need(stream: FileIO, start: int, count: int) -> None:
    """Ask the kernel to read `count` bytes of a local file from `start` on into the page cache. It does not wait for them."""
    if not hasattr(os, "posix_fadvise"):
        return
    for first in range(start, start + count, _ADVISED):
        os.posix_fadvise(stream.fileno(), first, min(_ADVISED, start + count - first), os.POSIX_FADV_WILLNEED)


def fetcher(cache: ShardCache | None, urls: Lazy[str], entries: Entries, bar: SharedBar) -> Fetch[int]:
    """A function that downloads a shard into the cache or, without one, reads it into the page cache."""

    def download(shard: int, stop: threading.Event) -> None:
        assert cache is not None
        cache.open(urls[shard], entries[shard]["bytes"], entries[shard]["sha256"], stop, bar.update).close()

    def read_ahead(shard: int, stop: threading.Event) -> None:
        with FileIO(urls[shard]) as stream:
            size = entries[shard]["bytes"]
            for start in range(0, size, _PIECE):
                if stop.is_set():
                    return
                will_need(stream, start, min(_PIECE, size - start))

    return download if cache else read_ahead


def download_bar(split: str, shards: Lazy[Path], entries: Entries) -> SharedBar:
    """The bar of the shards that the cache lacks. Each process of the machine downloads about an equal share of them."""

    def missing() -> int:
        total = sum(entry["bytes"] for path, entry in zip(shards, entries, strict=True) if not path.exists())
        return int(total) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    return SharedBar(f"downloading {split}", missing)
