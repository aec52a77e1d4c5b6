"""Fault injection (--plant), to check that the profiler finds the bottleneck.

reader=20   reads of shards are limited to 20 MB/s, even from the page cache
model=5     the train step takes 5 ms longer per image, during which the CPU is idle
threads=1   the loader has one decoding thread, as with --threads 1
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from pipeline.store.shards import ShardSet
from tools.profiler import storage

KINDS = ("reader", "model", "threads")


@dataclass(frozen=True)
class Planted:
    """kind: one of KINDS. amount: MB/s, ms or threads."""

    kind: str
    amount: float

    @staticmethod
    def parse(text: str) -> Planted:
        """KIND=AMOUNT, for argparse."""
        kind, _, amount = text.partition("=")
        try:
            value = float(amount)
        except ValueError:
            value = 0.0
        if kind not in KINDS or not 0 < value < float("inf") or (kind == "threads" and value != int(value)):
            raise argparse.ArgumentTypeError(f"{text!r} is not one of reader=MB/S, model=MS, threads=N")
        return Planted(kind, value)

    def __str__(self) -> str:
        return {
            "reader": f"reads limited to {self.amount:g} MB/s",
            "model": f"train step slowed down by {self.amount:g} ms per image",
            "threads": f"decoding threads limited to {self.amount:g}",
        }[self.kind]


class Throttle:
    """Limits all threads together to a number of bytes per second."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self._free_at = 0.0  # the time at which the bytes admitted so far have been transferred

    def wait_for(self, count: int) -> None:
        """Wait until `count` more bytes have been transferred."""
        with self._lock:
            self._free_at = max(self._free_at, time.perf_counter()) + count / self._bytes_per_s
            until = self._free_at
        if (wait := until - time.perf_counter()) > 0:
            time.sleep(wait)


@contextmanager
def slow_reader(megabytes_per_s: float) -> Iterator[None]:
    """Slow down reads of shards from their own storage. Reads from copies in a cache keep their speed."""
    throttle = Throttle(megabytes_per_s * 1e6)
    read, read_piece = ShardSet.read, storage.read_piece

    def slow_read(self: ShardSet, index: int) -> Any:
        if self.cache is None:
            throttle.wait_for(int(self.samples[index]["bytes"]))
        return read(self, index)

    def slow_piece(file: Path, offset: int) -> int:
        count = read_piece(file, offset)
        throttle.wait_for(count)
        return count

    with patch.object(ShardSet, "read", slow_read), patch.object(storage, "read_piece", slow_piece):
        yield
