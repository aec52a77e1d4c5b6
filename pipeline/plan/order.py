"""Orders: which sample comes at which position of an epoch. Each is a pure function of (seed, epoch, position).

- `Sequential`: as stored.
- `Full`: one permutation of all samples, `sampling.order`. A batch may read from as many shards as it has images. For shards on a
  local disk or in memory.
- `Blocks`: the shards are shuffled, K consecutive shards form a *block*, and the samples within a block are shuffled. Only the
  current block and the next are needed at a time. For remote shards. (FFCV's QUASI_RANDOM and webdataset's shuffle buffer have
  the same aim. Here the sample at any position can be computed, so the order can be resumed and divided among ranks.)
- `ByShape`: as stored, but grouped by output shape, for whole images.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt

from . import random, sampling
from .sampling import Ints

_AT_ONCE = 1 << 16  # shards of an order in memory at a time


class Order(ABC):
    """An order of `count` samples."""

    def __init__(self, count: int) -> None:
        self.count = count

    @abstractmethod
    def samples(self, epoch: int, positions: Ints) -> Ints:
        """The samples at some positions of an epoch: int64 (N,). positions: int64 (N,) in [0, count)."""

    def runs(self) -> Ints:
        """Lengths of the runs that an epoch is divided into, int64. A batch never spans two runs. By default there is one run."""
        return np.array([self.count])


class Sequential(Order):
    """As stored. O(1) memory."""

    def samples(self, epoch: int, positions: Ints) -> Ints:
        return positions


class Full(Order):
    """A uniformly random permutation of all samples, a new one each epoch. O(1) memory, O(1) time per position."""

    def __init__(self, count: int, seed: int) -> None:
        super().__init__(count)
        self._seed = seed

    def samples(self, epoch: int, positions: Ints) -> Ints:
        return sampling.order(self._seed, epoch, positions, self.count)


class Blocks(Order):
    """Shards in random order; `per_block` consecutive shards form a block, and its samples are permuted uniformly.

    Set-up is O(shards) in time and O(blocks) in memory, once per epoch; a position then takes O(log shards).

    How well this shuffles ImageNet's 1,281,167 images in shards of 1,000 and batches of 256 (means of 10 epochs, measured by
    tests/pipeline/plan/test_order.py):

        per_block                                        1        8       32    Full
        different shards in a batch                   1.25     8.19     32.1     232
        images that share their shard with another
            image of the batch (fraction)           1.0000   1.0000   0.9995  0.1807
        |Spearman| of position and stored position  0.0238   0.0238   0.0235  0.0008

    The converter shuffles the images before it makes shards. The images of a shard therefore have nothing in common, and a block
    of 8 shards is a random sample of the data set. Unlike with `Full`, the images of a shard stay close to each other in every
    epoch. (The rank correlation is that of a random order of shards. It falls with the square root of their number.)
    """

    def __init__(self, sizes: npt.ArrayLike, seed: int, per_block: int) -> None:
        """sizes: number of images in each shard, (S,). Samples are numbered shard after shard."""
        self._sizes = np.asarray(sizes, np.int64)
        super().__init__(int(self._sizes.sum()))
        self._ends = np.cumsum(self._sizes)  # number of stored samples before the end of each shard
        self._seed, self._per_block = seed, per_block
        self.blocks = -(-len(self._sizes) // per_block)  # in an epoch
        self._epochs: dict[int, Ints] = {}

    def block(self, epoch: int, position: int) -> int:
        """The block of an epoch that a position belongs to."""
        return int(np.searchsorted(self._bounds(epoch), position, "right")) - 1

    def shards(self, epoch: int, block: int) -> list[int]:
        """The shards of a block."""
        numbers: list[int] = self._shards(epoch, block * self._per_block, self._per_block).tolist()
        return numbers

    def samples(self, epoch: int, positions: Ints) -> Ints:
        bounds = self._bounds(epoch)
        blocks = np.searchsorted(bounds, positions, "right") - 1
        found = np.empty(len(positions), np.int64)
        for block in np.unique(blocks).tolist():
            here = blocks == block
            low, high = bounds[block], bounds[block + 1]
            permuted = np.empty(np.count_nonzero(here), np.int64)
            keys = np.uint64(self._seed), np.uint64(epoch), block, random.BLOCK
            random.permute(*keys, positions[here] - low, high - low, permuted)
            shards = self._shards(epoch, block * self._per_block, self._per_block)
            ends = np.cumsum(self._sizes[shards])
            turns = np.searchsorted(ends, permuted, "right")
            found[here] = self._ends[shards[turns]] - ends[turns] + permuted
        return found

    def _shards(self, epoch: int, first: int, count: int) -> Ints:
        """The shards at up to `count` consecutive places of an epoch, from place `first` on."""
        places = np.arange(first, min(first + count, len(self._sizes)))
        shards = np.empty_like(places)
        random.permute(np.uint64(self._seed), np.uint64(epoch), 0, random.SHARDS, places, len(self._sizes), shards)
        return shards

    def _bounds(self, epoch: int) -> Ints:
        """The number of an epoch's samples before each block, then the total: int64 (blocks + 1,)."""
        if epoch not in self._epochs:
            step = self._per_block * -(-_AT_ONCE // self._per_block)
            parts = (self._sizes[self._shards(epoch, first, step)] for first in range(0, len(self._sizes), step))
            counts = [np.add.reduceat(part, np.arange(0, len(part), self._per_block)) for part in parts]
            latest = list(self._epochs.items())[-1:]  # prefetching alternates between two epochs
            self._epochs = dict([*latest, (epoch, np.append(0, np.cumsum(np.concatenate(counts))))])
        return self._epochs[epoch]


class ByShape(Order):
    """Samples in stored order, but grouped by shape, in ascending order of shapes. O(N log N) set-up and O(N) memory.

    shapes: int64 (N, 2), output height and width of each sample.
    """

    def __init__(self, shapes: Ints) -> None:
        super().__init__(len(shapes))
        _, kinds, self._runs = np.unique(shapes, axis=0, return_inverse=True, return_counts=True)
        self._order = np.argsort(kinds, kind="stable")

    def samples(self, epoch: int, positions: Ints) -> Ints:
        found: Ints = self._order[positions]
        return found

    def runs(self) -> Ints:
        return self._runs
