"""Counter-based random numbers, compiled: Philox, and all kernels that draw with it. `sampling` describes the draws.

Sources:
- Philox4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. It is counter-based: a draw
  does not depend on earlier draws. The key is the seed, the counter is (sample low, sample high, epoch, stream).
- Permutations are Feistel networks with cycle walking: Black, Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002.

All words are 32-bit numbers held in uint64.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..jit import jit

# Each use of Philox has a stream of its own. The stream is the last word of the counter.
ORDER = 0  # a permutation of a split's samples
JITTER = 1
LIGHTING = 2
FLIP = 3  # of random resized crops, as the streams of their attempts have no word left for it
SHARDS = 4  # a permutation of a split's shards
BLOCK = 5  # a permutation of the samples of a block of shards; counter: (pair of keys, block, epoch, stream)
ATTEMPT = 16  # and the next 9: attempts of a random resized crop
SUBSTITUTE = 32  # and the next 31: substitutes of a corrupt sample

ATTEMPTS = 10  # of random resized crops, as in torchvision

# Measured with 120,000 keys on the permutations of 3, 4 and 5 samples: halves of 2 bits stay visibly biased even after 16
# rounds, halves of 3 bits need 8 rounds, halves of 4 bits pass a chi-square test from 4 rounds on. This uses 4 bits and 8 rounds.
_ROUNDS = 8  # each keyed by 64 bits, two to a Philox block
_MIN_HALF_BITS = 4

_LOW32 = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)
_TO_UNIT = 1.0 / 4294967296.0


@jit
def philox(key: Any, c0: Any, c1: Any, c2: Any, c3: Any) -> Any:
    """Philox4x32-10 of a 64-bit key and four 32-bit counter words: four words."""
    k0 = key & _LOW32
    k1 = key >> _32
    for _ in range(10):
        product0 = np.uint64(0xD2511F53) * c0
        product1 = np.uint64(0xCD9E8D57) * c2
        c0 = (product1 >> _32) ^ c1 ^ k0
        c1 = product1 & _LOW32
        c2 = (product0 >> _32) ^ c3 ^ k1
        c3 = product0 & _LOW32
        k0 = (k0 + np.uint64(0x9E3779B9)) & _LOW32
        k1 = (k1 + np.uint64(0xBB67AE85)) & _LOW32
    return c0, c1, c2, c3


@jit
def _of_sample(seed: Any, epoch: Any, sample: Any, stream: Any) -> Any:
    """Four random words for a sample in an epoch, from one stream."""
    sample = np.uint64(sample)
    return philox(seed, sample & _LOW32, sample >> _32, epoch, np.uint64(stream))


@jit
def _below(word: Any, n: Any) -> Any:
    """A word scaled to an integer in [0, n). The bias is at most n / 2^32: less than one in a million for n < 4096."""
    return np.int64((word * np.uint64(n)) >> _32)


@jit
def _between(word: Any, low: Any, high: Any) -> Any:
    """A word scaled to a real number in [low, high)."""
    return low + (high - low) * (word * _TO_UNIT)


@jit
def _is_heads(word: Any) -> Any:
    return (word >> np.uint64(31)) != np.uint64(0)


@jit
def _mix(x: Any) -> Any:
    """SplitMix64's finalizer (Steele, Lea, Flood 2014): every input bit flips every output bit with probability near 1/2."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@jit
def permute(seed: Any, epoch: Any, block: Any, stream: Any, positions: Any, n: Any, out: Any) -> None:
    """Evaluate the permutation of [0, n) with the key (seed, epoch, block, stream). positions, out: int64 (N,)."""
    half_bits = _MIN_HALF_BITS
    while (1 << (2 * half_bits)) < n:
        half_bits += 1
    half = np.uint64(half_bits)
    mask = np.uint64((1 << half_bits) - 1)

    keys = np.empty(_ROUNDS, np.uint64)
    for pair in range(_ROUNDS // 2):
        a, b, c, d = philox(seed, np.uint64(pair), np.uint64(block), epoch, np.uint64(stream))
        keys[2 * pair] = (a << _32) | b
        keys[2 * pair + 1] = (c << _32) | d

    for i in range(len(positions)):
        x = np.uint64(positions[i])
        while True:  # cycle walking: the network permutes [0, 4^half_bits); repeat until the result is in [0, n)
            left = x >> half
            right = x & mask
            for r in range(_ROUNDS):
                left, right = right, left ^ (_mix(right + keys[r]) >> _32) & mask
            x = (left << half) | right
            if x < np.uint64(n):
                break
        out[i] = np.int64(x)


@jit
def lighting(seed: Any, epoch: Any, samples: Any, std: Any, alphas: Any) -> None:
    """Fill alphas, float32 (N, 3), with normal numbers of standard deviation `std` (Box and Muller 1958)."""
    for i in range(len(samples)):
        w0, w1, w2, w3 = _of_sample(seed, epoch, samples[i], LIGHTING)
        # The word of each radius is mapped to (0, 1], so that its logarithm is finite.
        radius = math.sqrt(-2.0 * math.log((w0 + np.uint64(1)) * _TO_UNIT)) * std
        angle = 2.0 * math.pi * (w1 * _TO_UNIT)
        alphas[i, 0] = radius * math.cos(angle)
        alphas[i, 1] = radius * math.sin(angle)
        radius = math.sqrt(-2.0 * math.log((w2 + np.uint64(1)) * _TO_UNIT)) * std
        alphas[i, 2] = radius * math.cos(2.0 * math.pi * (w3 * _TO_UNIT))


@jit
def jitter(
    seed: Any, epoch: Any, samples: Any, heights: Any, widths: Any, low: Any, high: Any, crop: Any, padding: Any,
    short: Any, top: Any, left: Any, flip: Any,
) -> None:  # fmt: skip
    """Scale jitter: fill the first four fields of `sampling.Draws`, which are short side, corner and flip."""
    for i in range(len(samples)):
        w0, w1, w2, w3 = _of_sample(seed, epoch, samples[i], JITTER)
        s = low + _below(w0, high - low + 1)
        side = min(heights[i], widths[i])
        short[i] = s
        top[i] = _below(w1, (2 * heights[i] * s + side) // (2 * side) - crop + 1 + 2 * padding) - padding
        left[i] = _below(w2, (2 * widths[i] * s + side) // (2 * side) - crop + 1 + 2 * padding) - padding
        flip[i] = _is_heads(w3)


@jit
def resized_crop(
    seed: Any, epoch: Any, samples: Any, heights: Any, widths: Any, area_low: Any, area_high: Any, aspect_low: Any,
    aspect_high: Any, windows: Any, flip: Any,
) -> None:  # fmt: skip
    """torchvision's RandomResizedCrop.get_params. windows: float64 (N, 4), top, left, bottom, right, in whole pixels."""
    for i in range(len(samples)):
        height, width = heights[i], widths[i]
        rows, columns = 0, 0
        for attempt in range(ATTEMPTS):
            w0, w1, w2, w3 = _of_sample(seed, epoch, samples[i], ATTEMPT + attempt)
            area = height * width * _between(w0, area_low, area_high)
            aspect = math.exp(_between(w1, math.log(aspect_low), math.log(aspect_high)))
            columns, rows = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < columns <= width and 0 < rows <= height:
                top, left = _below(w2, height - rows + 1), _below(w3, width - columns + 1)
                break
        else:  # the central crop of the nearest aspect
            rows, columns = height, width
            if width < aspect_low * height:
                rows = round(width / aspect_low)
            elif width > aspect_high * height:
                columns = round(height * aspect_high)
            top, left = (height - rows) // 2, (width - columns) // 2
        windows[i, 0], windows[i, 1], windows[i, 2], windows[i, 3] = top, left, top + rows, left + columns
        flip[i] = _is_heads(_of_sample(seed, epoch, samples[i], FLIP)[0])


@jit
def substitute(seed: Any, epoch: Any, sample: Any, attempt: Any, n: Any) -> Any:
    """A number in [0, n) other than `sample`. n: at least 2."""
    w0, w1, _, _ = _of_sample(seed, epoch, sample, SUBSTITUTE + attempt)
    other = np.int64(((w0 << _32) | w1) % np.uint64(n - 1))
    return other + 1 if other >= sample else other
