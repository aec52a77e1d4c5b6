"""Progress of long work on stderr: a bar, or a line if the progress is unknown. Both appear only after three seconds."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

DELAY_S = 3.0  # quicker work stays silent
LOG_S = 10.0  # in a log, seconds between updates
BYTES: dict[str, Any] = {"unit": "B", "unit_scale": True}  # options of a bar that counts bytes


class _Bar(tqdm):
    def moveto(self, n: int) -> None:
        """Do not move the cursor to the line of a second bar in a log, which has no cursor."""
        if self.fp.isatty():
            super().moveto(n)


_Bar.set_lock(threading.RLock())  # tqdm's own is a semaphore of the system, of which Python complains if a worker is terminated


def _is_main() -> bool:
    """Whether this is rank 0, or the only process, of a training."""
    return os.environ.get("RANK", "0") == "0"


def progress_bar(iterable: Iterable[Any] | None = None, *, delayed: bool = True, **options: Any) -> Any:
    """A tqdm bar, on rank 0 only, with few updates in a log. delayed: appear after three seconds. options: tqdm's."""
    seconds = 0.1 if sys.stderr.isatty() else LOG_S
    defaults = {"mininterval": seconds, "maxinterval": LOG_S, "delay": DELAY_S if delayed else 0, "disable": not _is_main()}
    return _Bar(iterable, **defaults | options)


@contextmanager
def announce_if_slow(message: str) -> Iterator[None]:
    """Print a line, on rank 0 only, if the body takes more than three seconds. message: what it does, and how long that takes."""
    timer = threading.Timer(DELAY_S, tqdm.write, (message,), {"file": sys.stderr})
    timer.daemon = True
    if _is_main():
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


class SharedBar:
    """One bar for the bytes that several threads process. total: called when the first thread begins, for the number of bytes."""

    def __init__(self, label: str, total: Callable[[], int]) -> None:
        self._label, self._total = label, total
        self._lock = threading.Lock()
        self._bar: Any = None

    def update(self, count: int) -> None:
        with self._lock:
            if self._bar is None:
                self._bar = progress_bar(total=self._total(), desc=self._label, leave=False, **BYTES)
            self._bar.update(count)
            if self._bar.n >= self._bar.total:
                self._bar.close()  # later updates do nothing

    def close(self) -> None:
        with self._lock:
            if self._bar is not None:
                self._bar.close()
                self._bar = None
