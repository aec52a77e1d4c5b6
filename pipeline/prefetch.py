"""Background threads that fetch what will be wanted soon."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress

_THREADS = 4

Fetch = Callable[[int, threading.Event], None]


class Prefetcher:
    """Calls `fetch(number, stop)` for numbered things in a few threads, started at the first hint.

    fetch returns or raises soon once `stop` is set. Whatever it raises is dropped: who needs the thing meets the error again.
    The threads are daemons, so a program that forgets to close does not wait for downloads at its end.
    """

    def __init__(self, fetch: Fetch) -> None:
        self._fetch = fetch
        self._wanted: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._waiting: set[int] = set()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def hint(self, numbers: Iterable[int]) -> None:
        """Fetch these, in this order, unless they are waiting already."""
        if not self._threads:
            self._stop.clear()
            self._threads = [threading.Thread(target=self._run, name="cropfeed-prefetch", daemon=True) for _ in range(_THREADS)]
            for thread in self._threads:
                thread.start()
        for number in numbers:
            if number not in self._waiting:
                self._waiting.add(number)
                self._wanted.put(number)

    def close(self) -> None:
        """Stop fetching and end the threads. A later hint starts them again."""
        self._stop.set()
        for _ in self._threads:
            self._wanted.put(None)
        for thread in self._threads:
            if thread.ident is not None:  # an interrupt may have come before its start
                thread.join()
        self._threads.clear()
        self._waiting.clear()

    def _run(self) -> None:
        while (number := self._wanted.get()) is not None:
            if not self._stop.is_set():
                with suppress(Exception):
                    self._fetch(number, self._stop)
            self._waiting.discard(number)
