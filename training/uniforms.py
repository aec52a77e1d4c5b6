"""Random numbers of the training step as a pure function: of (seed, epoch, position in the epoch) and what they are for.

Random numbers: Philox of Salmon et al. 2011, NumPy's. The key is the seed and the stream, the counter (position, epoch). The
augmentation's own draws, which belong to samples, are `pipeline.plan.sampling`'s.
"""

from __future__ import annotations

from enum import Enum

import numpy as np
import numpy.typing as npt


class Stream(Enum):
    """What the numbers are for: the key's second word, in ASCII."""

    MIX = int.from_bytes(b"mixi")
    DROP = int.from_bytes(b"drop")


def uniforms(seed: int, stream: Stream, epoch: int, low: int, high: int, count: int) -> npt.NDArray[np.float64]:
    """Uniform in [0, 1): `count` numbers for each position in [low, high), as (high - low, count)."""
    blocks = -(-count // 4)  # a counter gives four numbers
    counter = np.array([low * blocks, epoch, 0, 0], np.uint64)
    bits = np.random.Philox(key=np.array([seed, stream.value], np.uint64), counter=counter)
    words = bits.random_raw(4 * blocks * (high - low)).reshape(-1, 4 * blocks)[:, :count]
    found: npt.NDArray[np.float64] = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return found
