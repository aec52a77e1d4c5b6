"""Background threads that fetch what will be wanted soon."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress

_THREADS = 4

Fetch = Callable[[int, threading.Event], None]


class Prefetcher:
    """Calls `fetch(number, stop)` for numbered things in up to four threads, which end when nothing waits any more.

    fetch returns or raises soon once `stop` is set. Whatever it raises is dropped: who needs the thing meets the error again.
    As no thread waits idle, a loader that is dropped without being closed leaves none behind; as they are daemons, a program
    that forgets to close does not wait for downloads at its end.
    """

    def __init__(self, fetch: Fetch) -> None:
        self._fetch = fetch
        self._lock = threading.Lock()  # guards the four below
        self._queue: deque[int] = deque()
        self._wanted: set[int] = set()  # what is queued or being fetched
        self._threads: set[threading.Thread] = set()
        self._stop = threading.Event()

    def hint(self, numbers: Iterable[int]) -> None:
        """Fetch these, in this order, unless they are queued or being fetched already."""
        with self._lock:
            for number in numbers:
                if number not in self._wanted:
                    self._wanted.add(number)
                    self._queue.append(number)
            while len(self._threads) < min(_THREADS, len(self._wanted)):
                thread = threading.Thread(target=self._run, name="cropfeed-prefetch", daemon=True)
                thread.start()
                self._threads.add(thread)

    def close(self) -> None:
        """Stop fetching and end the threads. A later hint starts new ones, also after an interrupt of this."""
        with self._lock:
            self._wanted.difference_update(self._queue)
            self._queue.clear()
            self._stop.set()
            self._stop = threading.Event()  # the next fetches'
            threads = list(self._threads)
        for thread in threads:
            thread.join()

    def _run(self) -> None:
        while (work := self._next()) is not None:
            with suppress(Exception):
                self._fetch(*work)
            with self._lock:
                self._wanted.discard(work[0])

    def _next(self) -> tuple[int, threading.Event] | None:
        """The next number and what stops its fetch; None ends the thread."""
        with self._lock:
            if self._queue:
                return self._queue.popleft(), self._stop
            self._threads.discard(threading.current_thread())
            return None
