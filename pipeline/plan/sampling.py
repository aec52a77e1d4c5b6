"""The random draws of the plan: which sample comes when, and how it is augmented.

An epoch is a pure function. `order` maps (seed, epoch, position) to a sample. `draw` maps (seed, epoch, sample, height, width) to
the resized short side, the crop's corner, the flip and the three PCA coefficients. There is no generator state, so any engine,
any number of workers and ranks, and any restart sees the same samples with the same draws.

The functions here check their arguments and call the kernels of `plan.random`. `plan.geometry` builds views from the draws.

Sources:
- Scale jitter with S uniform in [256, 480]: He et al., "Deep residual learning for image recognition", section 3.4. PCA
  coefficients N(0, 0.1): Krizhevsky et al., "ImageNet classification with deep convolutional neural networks", section 4.1.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from . import random

Ints = npt.NDArray[np.int64]

_SAMPLE_BITS = 40
MAX_SAMPLES = 1 << _SAMPLE_BITS
SCALE = (256, 480)  # range of the short side, He et al. 2015, section 3.4
CROP = 224
EVAL_SHORT = 256  # the short side in evaluation
ALPHA_STD = 0.1  # standard deviation of the PCA coefficients, Krizhevsky et al. 2012, section 4.1

MAX_SUBSTITUTES = 32  # attempts for a corrupt sample


class Draws(NamedTuple):
    """The draws of N samples.

    short: int64 (N,), pixels: the short side S after resizing.
    top, left: int64 (N,), pixels: the crop's corner in the resized image; negative in padding.
    flip: bool (N,): mirror left to right.
    alphas: float32 (N, 3): coefficients of the three principal components of RGB.
    """

    short: Ints
    top: Ints
    left: Ints
    flip: npt.NDArray[np.bool_]
    alphas: npt.NDArray[np.float32]


def order(seed: int, epoch: int, positions: npt.ArrayLike, n: int) -> Ints:
    """The samples at some positions of the epoch's order, a keyed permutation of [0, n). Only these positions are evaluated.

    seed: 0 <= seed < 2^64. epoch: 0 <= epoch < 2^32. positions: integers (N,) in [0, n). n: 1 <= n <= 2^40.
    Returns int64 (N,). Memory is O(N), independent of n; time is O(1) per position. Raises ValueError outside these ranges.
    """
    positions = np.ascontiguousarray(positions, np.int64)
    _check_key(seed, epoch)
    if not 1 <= n <= MAX_SAMPLES:
        raise ValueError(f"n must be between 1 and 2^40, not {n}")
    if len(positions) and not (positions.min() >= 0 and positions.max() < n):
        raise ValueError(f"positions must lie in [0, {n})")
    out = np.empty(len(positions), np.int64)
    random.permute(np.uint64(seed), np.uint64(epoch), 0, random.ORDER, positions, n, out)
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
    padding: int = 0,
) -> Draws:
    """Every random draw of N samples in one epoch.

    samples: integers (N,) in [0, 2^40). heights, widths: integers (N,) > 0, the stored images' pixels.
    scale: inclusive range of the resized short side, pixels, from which it is drawn uniformly; at least `crop`.
    crop: side of the square crop, pixels. Its corner is uniform over all integer positions in the resized image.
    alpha_std: standard deviation of the PCA coefficients. padding: pixels added on each side of the resized image,
    0 <= padding < crop; corners are relative to the image without padding. Raises ValueError outside these ranges.
    """
    samples = _samples(samples)
    heights, widths = _sizes(heights, widths, len(samples))
    low, high = scale
    _check_key(seed, epoch)
    if not 1 <= crop <= low <= high:
        raise ValueError(f"scale must satisfy crop <= low <= high, not crop {crop}, scale {low} to {high}")
    if not 0 <= padding < crop:
        raise ValueError(f"padding must satisfy 0 <= padding < crop, not crop {crop}, padding {padding}")
    short, top, left = (np.empty(len(samples), np.int64) for _ in range(3))
    flip = np.empty(len(samples), np.bool_)
    random.jitter(np.uint64(seed), np.uint64(epoch), samples, heights, widths, low, high, crop, padding, short, top, left, flip)
    return Draws(short, top, left, flip, alphas(seed, epoch, samples, alpha_std))


def alphas(
    seed: int, epoch: int, samples: npt.ArrayLike, std: float = ALPHA_STD, view: npt.ArrayLike = 0
) -> npt.NDArray[np.float32]:
    """The PCA coefficients of N samples in one epoch: float32 (N, 3), normal with standard deviation `std`. view: as in
    `resized_crops`."""
    samples = _samples(samples, view)
    _check_key(seed, epoch)
    drawn = np.empty((len(samples), 3), np.float32)
    random.lighting(np.uint64(seed), np.uint64(epoch), samples, float(std), drawn)
    return drawn


def resized_crops(
    seed: int,
    epoch: int,
    samples: npt.ArrayLike,
    heights: npt.ArrayLike,
    widths: npt.ArrayLike,
    area: tuple[float, float],
    aspect: tuple[float, float],
    view: npt.ArrayLike = 0,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """torchvision's random resized crops of N samples in one epoch: windows, float64 (N, 4) as in `windows`, and flip, bool (N,).

    samples, heights, widths: as in `draw`. area: range of the window's fraction of the image, uniform, 0 < low <= high <= 1.
    aspect: range of its width divided by its height, log-uniform, 0 < low <= high. The first of ten attempts that fits into the
    image is taken; if none fits, the largest central window within the range of aspect ratios.
    view: integer or integers (N,) >= 0, the number of a view among those of its image. Each has draws of its own.
    """
    samples = _samples(samples, view)
    heights, widths = _sizes(heights, widths, len(samples))
    _check_key(seed, epoch)
    if not (0 < area[0] <= area[1] <= 1 and 0 < aspect[0] <= aspect[1]):
        raise ValueError(f"area must satisfy 0 < low <= high <= 1 and aspect 0 < low <= high, not {area} and {aspect}")
    found, flip = np.empty((len(samples), 4), np.float64), np.empty(len(samples), np.bool_)
    keys = np.uint64(seed), np.uint64(epoch)
    (low, high), (wide_low, wide_high) = map(float, area), map(float, aspect)
    random.resized_crop(*keys, samples, heights, widths, low, high, wide_low, wide_high, found, flip)
    return found, flip


def substitute(seed: int, epoch: int, sample: int, attempt: int, n: int) -> int:
    """The sample that replaces a corrupt one in an epoch. It is uniform on all n samples except `sample`.

    attempt: 0 <= attempt < 32, the number of substitutes tried before that were corrupt, too. n: 2 <= n <= 2^40.
    """
    _check_key(seed, epoch)
    if not (0 <= sample < n and 2 <= n <= MAX_SAMPLES and 0 <= attempt < MAX_SUBSTITUTES):
        raise ValueError(
            f"sample {sample} of {n}: must be one of at least 2; attempt {attempt} must lie in [0, {MAX_SUBSTITUTES})"
        )
    return int(random.substitute(np.uint64(seed), np.uint64(epoch), sample, attempt, n))


def short_at(short: int, size: int, nominal: int = CROP) -> int:
    """A short side for crops of `size`, in proportion to `short` for crops of `nominal`; at least `size`."""
    return max(round(short * size / nominal), size)


def centre(heights: npt.ArrayLike, widths: npt.ArrayLike, short: int, crop: int) -> Draws:
    """The evaluation transform as `Draws`: short side `short`, the central crop, no flip, no lighting."""
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
    """Heights and widths after resizing to the short side: floor(side * S / short + 1/2), in integer arithmetic."""
    heights, widths = _sizes(heights, widths)
    side = np.minimum(heights, widths)
    short = np.asarray(short, np.int64)
    return (2 * heights * short + side) // (2 * side), (2 * widths * short + side) // (2 * side)


def windows(drawn: Draws, heights: npt.ArrayLike, widths: npt.ArrayLike, crop: int) -> npt.NDArray[np.float64]:
    """Each crop's window in its stored image: float64 (N, 4) of top, left, bottom, right in source pixels.

    Resampling this window to crop x crop, with filter support outside it, equals resizing the image and taking the crop.
    The scale is short / S on both axes. The rounded size is centred on the image, as DALI's `resize_shorter` does. The window is
    clamped to the image.
    """
    heights, widths = _sizes(heights, widths, len(drawn.short))
    scale = np.minimum(heights, widths) / drawn.short
    out = np.empty((len(heights), 4), np.float64)
    for axis, (corner, side, size) in enumerate(
        zip((drawn.top, drawn.left), (heights, widths), resized(heights, widths, drawn.short), strict=True)
    ):
        low = (corner - size / 2) * scale + side / 2
        out[:, axis] = np.maximum(low, 0.0)
        out[:, axis + 2] = np.minimum(low + crop * scale, side)
    return out


def regions(
    windows: npt.NDArray[np.float64],
    heights: npt.ArrayLike,
    widths: npt.ArrayLike,
    size: int | tuple[int, int] | Ints,
    support: float = 1.0,
) -> Ints:
    """The source pixels that resampling each window needs: int64 (N, 4) of top, left, bottom, right, inside the image.

    size: height and width of the outputs, pixels, one integer for both, or int64 (N, 2). Along each axis the filter reaches
    `support` output pixels beyond the window, which is support * max(scale, 1) source pixels: 1 for bilinear, 2 for bicubic. One
    more pixel is added for rounding.
    """
    low, high = windows[:, :2], windows[:, 2:]
    margin = support * np.maximum((high - low) / np.asarray(size), 1.0) + 1.0
    sides = np.stack(_sizes(heights, widths, len(windows)), axis=1)
    region = np.concatenate([np.maximum(np.floor(low - margin), 0), np.minimum(np.ceil(high + margin), sides)], axis=1)
    return region.astype(np.int64)


def rank_range(start: int, stop: int, rank: int, world_size: int) -> tuple[int, int]:
    """A rank's range [low, high) of the global batch [start, stop). The ranks' ranges are consecutive; sizes differ by 0 or 1."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must lie in [0, {world_size}), not {rank}")
    size = stop - start
    return start + size * rank // world_size, start + size * (rank + 1) // world_size


def _check_key(seed: int, epoch: int) -> None:
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must lie in [0, 2^64), not {seed}")
    if not 0 <= epoch < 1 << 32:
        raise ValueError(f"epoch must lie in [0, 2^32), not {epoch}")


def _samples(samples: npt.ArrayLike, view: npt.ArrayLike = 0) -> Ints:
    """Samples as the kernels take them, int64 (N,). The number of a view is in the bits above a sample's."""
    samples = np.ascontiguousarray(samples, np.int64)
    if len(samples) and not (samples.min() >= 0 and samples.max() < MAX_SAMPLES):
        raise ValueError("samples must lie in [0, 2^40)")
    return samples + (np.asarray(view, np.int64) << _SAMPLE_BITS)


def _sizes(heights: npt.ArrayLike, widths: npt.ArrayLike, count: int | None = None) -> tuple[Ints, Ints]:
    heights = np.ascontiguousarray(heights, np.int64)
    widths = np.ascontiguousarray(widths, np.int64)
    if heights.shape != widths.shape or heights.ndim != 1 or (count is not None and len(heights) != count):
        raise ValueError("heights and widths must be one-dimensional, one for each sample")
    if len(heights) and min(heights.min(), widths.min()) < 1:
        raise ValueError("heights and widths must be positive")
    return heights, widths
