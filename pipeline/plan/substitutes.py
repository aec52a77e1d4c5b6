"""What takes the places of samples that cannot be decoded."""

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
    """The samples found that cannot be decoded, and, by `plan.substitute`, their substitutes. For any thread.

    `corrupt`: sample -> why it cannot be decoded. Whether it can is asked for each epoch by itself, because another epoch's crop
    may miss the damage: a loader that knows the sample must not give other batches than one that was resumed and does not.
    """

    def __init__(self, seed: int, count: int, stops: bool, where: Callable[[int], str]) -> None:
        """count: of samples. stops: whether a corrupt sample is an error. where: file and key of a sample, for messages."""
        self._seed, self._count, self._stops, self._where = seed, count, stops, where
        self.corrupt: dict[int, str] = {}
        self._unreadable: set[tuple[int, int]] = set()  # (epoch, sample)
        self._marking = threading.Lock()

    def mark(self, epoch: int, sample: int, reason: str) -> None:
        """A sample's views of an epoch cannot be decoded. Warns once of each sample; raises UserError if that is to stop."""
        with self._marking:
            known = sample in self.corrupt
            self.corrupt[sample] = reason
            self._unreadable.add((epoch, sample))
        if self._stops:
            raise UserError(f"{self._where(sample)}: cannot be decoded ({reason}); make the shards again")
        if not known:
            log.warning("%s: cannot be decoded (%s); another sample takes its place", self._where(sample), reason)

    def apply(self, epoch: int, ids: Ints) -> Ints:
        """The samples, int64 (N,), with those that are known to be unreadable in this epoch replaced. Raises UserError where
        substitutes are all unreadable, too.
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
        raise UserError(f"{self._where(sample)}: cannot be decoded, nor can what should replace it; make the shards again")
