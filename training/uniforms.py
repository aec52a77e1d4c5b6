"""Random numbers of the training step, as a pure function of (seed, purpose, epoch, position in the epoch).

They come from NumPy's Philox (Salmon et al. 2011). The key is (seed, stream), the counter (position, epoch). The draws of the
augmentation, which depend on the sample, are in `pipeline.plan.sampling`.
"""

from __future__ import annotations

from enum import Enum

import numpy as np
import numpy.typing as npt


class Stream(Enum):
    """The purpose of the random numbers. Its value, an ASCII word, is the second word of Philox's key."""

    MIX = int.from_bytes(b"mixi")
    DROP = int.from_bytes(b"drop")


def uniforms(seed: int, stream: Stream, epoch: int, low: int, high: int, count: int) -> npt.NDArray[np.float64]:
    """`count` uniform numbers in [0, 1) for each position in [low, high): float64 (high - low, count)."""
    blocks = -(-count // 4)  # each counter value gives four numbers
    counter = np.array([low * blocks, epoch, 0, 0], np.uint64)
    bits = np.random.Philox(key=np.array([seed, stream.value], np.uint64), counter=counter)
    words = bits.random_raw(4 * blocks * (high - low)).reshape(-1, 4 * blocks)[:, :count]
    found: npt.NDArray[np.float64] = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return found
