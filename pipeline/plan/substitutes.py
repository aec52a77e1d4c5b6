"""Substitutes for samples that cannot be decoded."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import numpy as np

from ..errors import UserError
from . import sampling
from .sampling import Ints

log = logging.getLogger("cropfeed")


class Substitutes:
    """The corrupt samples found so far, and their substitutes, which `sampling.substitute` chooses. Thread-safe.

    `corrupt`: sample -> why it cannot be decoded. Every epoch tries again to decode a corrupt sample, because its crop may miss
    the damage. A loader that has met the sample before must give the same batches as a resumed one that has not.
    """

    def __init__(self, seed: int, count: int, stop: bool, locate: Callable[[int], str]) -> None:
        """count: number of samples. stop: whether a corrupt sample is an error. locate: sample -> file and key, for messages."""
        self._seed, self._count, self._stop, self._locate = seed, count, stop, locate
        self.corrupt: dict[int, str] = {}
        self._unreadable: set[tuple[int, int]] = set()  # (epoch, sample)
        self._lock = threading.Lock()

    def mark(self, epoch: int, sample: int, reason: str) -> None:
        """Record that a sample cannot be decoded in an epoch. Warns once per sample. Raises UserError if `stop` is set."""
        with self._lock:
            known = sample in self.corrupt
            self.corrupt[sample] = reason
            self._unreadable.add((epoch, sample))
        if self._stop:
            raise UserError(f"{self._locate(sample)}: cannot be decoded ({reason})", "make the shards again")
        if not known:
            log.warning("%s: cannot be decoded (%s); another sample replaces it", self._locate(sample), reason)

    def apply(self, epoch: int, ids: Ints) -> Ints:
        """Replace the samples that are known to be corrupt in this epoch. ids: int64 (N,), as is the result.

        Raises UserError if none of a sample's substitutes can be decoded either.
        """
        if not self._unreadable:
            return ids
        return np.array([self._decodable(epoch, sample) for sample in ids.tolist()])

    def _decodable(self, epoch: int, sample: int) -> int:
        if (epoch, sample) not in self._unreadable:
            return sample
        for attempt in range(sampling.MAX_SUBSTITUTES if self._count > 1 else 0):
            other = sampling.substitute(self._seed, epoch, sample, attempt, self._count)
            if (epoch, other) not in self._unreadable:
                return other
        raise UserError(f"{self._locate(sample)}: neither it nor its substitutes can be decoded", "make the shards again")
