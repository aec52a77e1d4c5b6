"""Background threads that fetch shards before they are needed, and the bar of their downloads."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..progress import SharedBar
from .cache import ShardCache
from .waiting import join

_THREADS = 4

Fetch = Callable[[int, threading.Event], None]


class Prefetcher:
    """Calls `fetch(number, stop)` for requested numbers in up to four threads.

    fetch must return or raise soon after `stop` is set. Its errors are ignored, as a later read of the item raises them again.
    Threads end when the queue is empty, so a loader that is not closed leaves no threads behind. They are daemon threads, so a
    program that does not close the loader does not wait for downloads at exit.
    """

    def __init__(self, fetch: Fetch) -> None:
        self._fetch = fetch
        self._lock = threading.Lock()  # guards the attributes below
        self._queue: deque[int] = deque()
        self._requested: set[int] = set()  # queued or being fetched
        self._threads: set[threading.Thread] = set()
        self._stop = threading.Event()

    def request(self, numbers: Iterable[int]) -> None:
        """Fetch these numbers, in this order, except those that are already queued or being fetched."""
        with self._lock:
            for number in numbers:
                if number not in self._requested:
                    self._requested.add(number)
                    self._queue.append(number)
            while len(self._threads) < min(_THREADS, len(self._requested)):
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

    def _next(self) -> tuple[int, threading.Event] | None:
        """The next number and the event that stops its fetch; None ends the thread."""
        with self._lock:
            if self._queue:
                return self._queue.popleft(), self._stop
            self._threads.discard(threading.current_thread())
            return None


def fetcher(cache: ShardCache | None, urls: Sequence[str], entries: Sequence[Mapping[str, Any]], bar: SharedBar) -> Fetch:
    """A function that downloads a shard into the cache or, without one, reads it into the page cache."""

    def download(shard: int, stop: threading.Event) -> None:
        assert cache is not None
        cache.open(urls[shard], entries[shard]["bytes"], entries[shard]["sha256"], stop, bar.update).close()

    def read_ahead(shard: int, stop: threading.Event) -> None:
        with open(urls[shard], "rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    return download if cache else read_ahead


def download_bar(split: str, shards: Sequence[Path], entries: Sequence[Mapping[str, Any]]) -> SharedBar:
    """The bar of the shards that the cache lacks. Each process of the machine downloads about an equal share of them."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    found = list(zip(shards, entries, strict=True))
    return SharedBar(
        f"downloading {split}", lambda: sum(entry["bytes"] for path, entry in found if not path.exists()) // processes
    )
