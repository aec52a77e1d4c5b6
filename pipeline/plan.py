"""The plan: which sample comes when, and every random draw of its augmentation.

An epoch is a pure function. `order` maps (seed, epoch, position) to a sample; `draw` maps (seed, epoch, sample, height,
width) to the resized short side, the crop's corner, the flip and the three PCA coefficients. No generator state lives
anywhere, so any engine, worker count, rank count or restart sees the same samples with the same draws.

Sources:
- Philox4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Counter-based, so a
  draw needs no predecessor. Our counter is (sample low, sample high, epoch, stream), our key is the seed.
- The order is a Feistel network with cycle walking: Black, Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002.
- Scale jitter with S uniform in [256, 480]: He et al., "Deep residual learning for image recognition", section 3.4. PCA
  coefficients N(0, 0.1): Krizhevsky et al., "ImageNet classification with deep convolutional neural networks", section 4.1.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

Ints = npt.NDArray[np.int64]

MAX_SAMPLES = 1 << 40
SCALE = (256, 480)  # the short side's range, He et al. 2015, section 3.4
CROP = 224
EVAL_SHORT = 256  # the short side in evaluation
ALPHA_STD = 0.1  # standard deviation of the PCA coefficients, Krizhevsky et al. 2012, section 4.1

# Streams keep the plan's uses of Philox apart; they are its counter's last word.
_STREAM_ORDER = 0
_STREAM_GEOMETRY = 1
_STREAM_COLOUR = 2

# Measured with 120,000 keys on the permutations of 3, 4 and 5 samples: halves of 2 bits stay visibly biased even after 16
# rounds, halves of 3 bits need 8 rounds, halves of 4 bits pass a chi-square test from 4 rounds on. We take 4 bits and 8.
_ROUNDS = 8  # each keyed by 64 bits, two to a Philox block
_MIN_HALF_BITS = 4


class Draws(NamedTuple):
    """What the plan drew for N samples (or, indexed with `one`, for a single one).

    short: int64 (N,), pixels: the short side S after resizing.
    top, left: int64 (N,), pixels: the crop's corner in the resized image.
    flip: bool (N,): mirror left to right.
    alphas: float32 (N, 3): coefficients of the three principal components of RGB.
    """

    short: Ints
    top: Ints
    left: Ints
    flip: npt.NDArray[np.bool_]
    alphas: npt.NDArray[np.float32]

    def one(self, index: int) -> Draws:
        """The draws of a single sample, kept as arrays of length one."""
        at = slice(index, index + 1)
        return Draws(self.short[at], self.top[at], self.left[at], self.flip[at], self.alphas[at])


@njit(cache=True, nogil=True)
def _philox(key: Any, c0: Any, c1: Any, c2: Any, c3: Any) -> Any:
    """Philox4x32-10 of a 64-bit key and four 32-bit counter words: four 32-bit words, all held in uint64."""
    low32 = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    k0 = key & low32
    k1 = key >> shift
    for _ in range(10):
        product0 = np.uint64(0xD2511F53) * c0
        product1 = np.uint64(0xCD9E8D57) * c2
        c0 = (product1 >> shift) ^ c1 ^ k0
        c1 = product1 & low32
        c2 = (product0 >> shift) ^ c3 ^ k1
        c3 = product0 & low32
        k0 = (k0 + np.uint64(0x9E3779B9)) & low32
        k1 = (k1 + np.uint64(0xBB67AE85)) & low32
    return c0, c1, c2, c3


@njit(cache=True, nogil=True)
def _below(word: Any, n: Any) -> Any:
    """A 32-bit word scaled to an integer in [0, n). The bias is n / 2^32 at most: under one in a million for n < 4096."""
    return np.int64((word * np.uint64(n)) >> np.uint64(32))


@njit(cache=True, nogil=True)
def _mix(x: Any) -> Any:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): every input bit flips every output bit with probability near 1/2."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@njit(cache=True, nogil=True)
def _order(seed: Any, epoch: Any, positions: Any, n: Any, out: Any) -> None:
    half_bits = _MIN_HALF_BITS
    while (1 << (2 * half_bits)) < n:
        half_bits += 1
    half = np.uint64(half_bits)
    mask = np.uint64((1 << half_bits) - 1)

    keys = np.empty(_ROUNDS, np.uint64)
    for pair in range(_ROUNDS // 2):
        a, b, c, d = _philox(seed, np.uint64(pair), np.uint64(0), epoch, np.uint64(_STREAM_ORDER))
        keys[2 * pair] = (a << np.uint64(32)) | b
        keys[2 * pair + 1] = (c << np.uint64(32)) | d

    for i in range(len(positions)):
        x = np.uint64(positions[i])
        while True:  # cycle walking: the network permutes [0, 4^half_bits); step until we are back inside [0, n)
            left = x >> half
            right = x & mask
            for r in range(_ROUNDS):
                left, right = right, left ^ (_mix(right + keys[r]) >> np.uint64(32)) & mask
            x = (left << half) | right
            if x < np.uint64(n):
                break
        out[i] = np.int64(x)


@njit(cache=True, nogil=True)
def _draw(
    seed: Any, epoch: Any, samples: Any, heights: Any, widths: Any, low: Any, high: Any, crop: Any, std: Any,
    short: Any, top: Any, left: Any, flip: Any, alphas: Any,
) -> None:  # fmt: skip
    low32 = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    to_unit = 1.0 / 4294967296.0
    for i in range(len(samples)):
        sample = np.uint64(samples[i])
        s0, s1 = sample & low32, sample >> shift

        w0, w1, w2, w3 = _philox(seed, s0, s1, epoch, np.uint64(_STREAM_GEOMETRY))
        s = low + _below(w0, high - low + 1)
        side = min(heights[i], widths[i])
        short[i] = s
        top[i] = _below(w1, (2 * heights[i] * s + side) // (2 * side) - crop + 1)
        left[i] = _below(w2, (2 * widths[i] * s + side) // (2 * side) - crop + 1)
        flip[i] = (w3 >> np.uint64(31)) != np.uint64(0)

        # Box and Muller 1958; the first word is taken from (0, 1] so that its logarithm is finite.
        w0, w1, w2, w3 = _philox(seed, s0, s1, epoch, np.uint64(_STREAM_COLOUR))
        radius = math.sqrt(-2.0 * math.log((w0 + np.uint64(1)) * to_unit)) * std
        angle = 2.0 * math.pi * (w1 * to_unit)
        alphas[i, 0] = radius * math.cos(angle)
        alphas[i, 1] = radius * math.sin(angle)
        radius = math.sqrt(-2.0 * math.log((w2 + np.uint64(1)) * to_unit)) * std
        alphas[i, 2] = radius * math.cos(2.0 * math.pi * (w3 * to_unit))


def order(seed: int, epoch: int, positions: npt.ArrayLike, n: int) -> Ints:
    """The samples at `positions` of the epoch's order: a keyed permutation of [0, n), evaluated point by point.

    seed: 0 <= seed < 2^64. epoch: 0 <= epoch < 2^32. positions: integers (N,) in [0, n). n: 1 <= n <= 2^40.
    Returns int64 (N,). Memory is O(N) whatever n is; time is O(1) a position. Raises ValueError outside these ranges.
    """
    positions = np.ascontiguousarray(positions, np.int64)
    _check_key(seed, epoch)
    if not 1 <= n <= MAX_SAMPLES:
        raise ValueError(f"n must be between 1 and 2^40, not {n}")
    if len(positions) and not (positions.min() >= 0 and positions.max() < n):
        raise ValueError(f"positions must lie in [0, {n})")
    out = np.empty(len(positions), np.int64)
    _order(np.uint64(seed), np.uint64(epoch), positions, np.int64(n), out)
    return out


def draw(
    seed: int,
    epoch: int,
    samples: npt.ArrayLike,
    heights: npt.ArrayLike,
    widths: npt.ArrayLike,
    scale: tuple[int, int] = SCALE,
    crop: int = CROP,
    alpha_std: float = ALPHA_STD,
) -> Draws:
    """Every random draw of N samples in one epoch.

    samples: integers (N,) in [0, 2^40). heights, widths: integers (N,) > 0, the stored images' pixels.
    scale: the inclusive range that the resized short side is uniform on, in pixels; its low end is at least `crop`.
    crop: the square crop's side in pixels; its corner is uniform over all whole-pixel places in the resized image.
    alpha_std: standard deviation of the PCA coefficients. Raises ValueError outside these ranges.
    """
    samples = np.ascontiguousarray(samples, np.int64)
    heights, widths = _sizes(heights, widths, len(samples))
    low, high = scale
    _check_key(seed, epoch)
    if not 1 <= crop <= low <= high:
        raise ValueError(f"scale must satisfy crop <= low <= high, not crop {crop}, scale {low} to {high}")
    if len(samples) and not (samples.min() >= 0 and samples.max() < MAX_SAMPLES):
        raise ValueError("samples must lie in [0, 2^40)")
    count = len(samples)
    drawn = Draws(
        np.empty(count, np.int64),
        np.empty(count, np.int64),
        np.empty(count, np.int64),
        np.empty(count, np.bool_),
        np.empty((count, 3), np.float32),
    )
    _draw(np.uint64(seed), np.uint64(epoch), samples, heights, widths, low, high, crop, float(alpha_std), *drawn)
    return drawn


def short_at(short: int, size: int) -> int:
    """What the short side `short`, meant for crops of 224, is for crops of `size`: in the same proportion, whole pixels."""
    return round(short * size / CROP)


def centre(heights: npt.ArrayLike, widths: npt.ArrayLike, short: int, crop: int) -> Draws:
    """The evaluation transform in the same terms: short side `short`, the central crop, no flip, no colour change."""
    heights, widths = _sizes(heights, widths)
    if not 1 <= crop <= short:
        raise ValueError(f"the short side ({short}) must be at least the crop ({crop})")
    count = len(heights)
    shorts = np.full(count, short, np.int64)
    out_heights, out_widths = resized(heights, widths, shorts)
    return Draws(
        shorts, (out_heights - crop) // 2, (out_widths - crop) // 2, np.zeros(count, np.bool_), np.zeros((count, 3), np.float32)
    )


def resized(heights: npt.ArrayLike, widths: npt.ArrayLike, short: npt.ArrayLike) -> tuple[Ints, Ints]:
    """Heights and widths after resizing to the short side: floor(side * S / short + 1/2), in whole numbers throughout."""
    heights, widths = _sizes(heights, widths)
    side = np.minimum(heights, widths)
    short = np.asarray(short, np.int64)
    return (2 * heights * short + side) // (2 * side), (2 * widths * short + side) // (2 * side)


def windows(draws: Draws, heights: npt.ArrayLike, widths: npt.ArrayLike, crop: int) -> npt.NDArray[np.float64]:
    """Where each crop lies in its stored image: float64 (N, 4) of top, left, bottom, right in source pixels.

    Resampling this window to crop x crop, with filter support outside it, is resizing the image and taking the crop.
    The scale is short / S on both axes; the rounded size is centred on the image (DALI's `resize_shorter` does the same);
    the window is clamped to the image.
    """
    heights, widths = _sizes(heights, widths, len(draws.short))
    scale = np.minimum(heights, widths) / draws.short
    out = np.empty((len(heights), 4), np.float64)
    for axis, (corner, side, size) in enumerate(
        zip((draws.top, draws.left), (heights, widths), resized(heights, widths, draws.short), strict=True)
    ):
        low = (corner - size / 2) * scale + side / 2
        out[:, axis] = np.maximum(low, 0.0)
        out[:, axis + 2] = np.minimum(low + crop * scale, side)
    return out


def regions(windows: npt.NDArray[np.float64], heights: npt.ArrayLike, widths: npt.ArrayLike, crop: int) -> Ints:
    """The source pixels that resampling each window needs: int64 (N, 4) of top, left, bottom, right, inside the image.

    The triangle filter reaches one output pixel, which is max(scale, 1) source pixels; one more for rounding.
    """
    low, high = windows[:, :2], windows[:, 2:]
    margin = np.maximum((high - low) / crop, 1.0).max(axis=1, keepdims=True) + 1.0
    sides = np.stack(_sizes(heights, widths, len(windows)), axis=1)
    region = np.concatenate([np.maximum(np.floor(low - margin), 0), np.minimum(np.ceil(high + margin), sides)], axis=1)
    return region.astype(np.int64)


def share(start: int, stop: int, rank: int, world_size: int) -> tuple[int, int]:
    """Rank `rank`'s part [low, high) of the global batch [start, stop): parts tile it in rank order, sizes differ by one."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must lie in [0, {world_size}), not {rank}")
    size = stop - start
    return start + size * rank // world_size, start + size * (rank + 1) // world_size


def _check_key(seed: int, epoch: int) -> None:
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must lie in [0, 2^64), not {seed}")
    if not 0 <= epoch < 1 << 32:
        raise ValueError(f"epoch must lie in [0, 2^32), not {epoch}")


def _sizes(heights: npt.ArrayLike, widths: npt.ArrayLike, count: int | None = None) -> tuple[Ints, Ints]:
    heights = np.ascontiguousarray(heights, np.int64)
    widths = np.ascontiguousarray(widths, np.int64)
    if heights.shape != widths.shape or heights.ndim != 1 or (count is not None and len(heights) != count):
        raise ValueError("heights and widths must be one-dimensional, one for each sample")
    if len(heights) and min(heights.min(), widths.min()) < 1:
        raise ValueError("heights and widths must be positive")
    return heights, widths
