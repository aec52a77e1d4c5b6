"""Background threads that fetch numbered items, such as shards, before they are needed."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress

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
        """Stop fetching and end the threads. A later request starts new ones, even if this call was interrupted."""
        with self._lock:
            self._requested.difference_update(self._queue)
            self._queue.clear()
            self._stop.set()
            self._stop = threading.Event()  # for later requests
            threads = list(self._threads)
        for thread in threads:
            thread.join()

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
