"""Geometries: which views are taken of an image, and of what size.

A *view* is a window of an image, resampled to the output size and possibly mirrored. The filter is antialiased and bilinear; its
support may lie outside the window but not outside the image (Pillow: `resize((w, h), BILINEAR, box=window)`). A crop that reaches
into padding is the nearest crop inside the image, shifted by whole pixels and zero-padded.
Each geometry is a pure function from (seed, epoch, sample, height, width) to its views.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from ..errors import UserError
from . import sampling
from .sampling import Ints

GEOMETRIES = ("jitter", "rrc", "pad")  # for training, see `choose_geometry`
MAX_ASPECT = 16  # of whole images: at a short side of 640, they have no more pixels than 131 crops of 224


class Views(NamedTuple):
    """V = N * crops views of N images; the views of an image are adjacent.

    - windows: float64 (V, 4), top, left, bottom, right in source pixels, inside the image.
    - flip: bool (V,), mirror left to right.
    - alphas: float32 (V, 3), coefficients of the principal components of RGB.
    - shift: int64 (V, 2), whole pixels down and right by which the resampled and mirrored views are moved, see
      `pixels.normalize.translate`; None if the geometry moves none.
    """

    windows: npt.NDArray[np.float64]
    flip: npt.NDArray[np.bool_]
    alphas: npt.NDArray[np.float32]
    shift: Ints | None = None

    @property
    def arrays(self) -> tuple[npt.NDArray[Any], ...]:
        """The arrays that are not None, each with one row per view."""
        return tuple(column for column in self if column is not None)


class ViewGroup(NamedTuple):
    """The views of one size that each image has: how many, and their height and width, pixels."""

    crops: int
    height: int
    width: int


class Geometry(ABC):
    """The interface of all geometries. Heights and widths are int64 (N,), source pixels; `size` is the crop's side, pixels."""

    random: ClassVar[bool] = False  # whether seed and epoch matter, and PCA lighting applies

    @property
    def crops(self) -> int:
        """Views of each image."""
        return 1

    @property
    def counts(self) -> tuple[int, ...]:
        """Views of each image, by size."""
        return (self.crops,)

    @abstractmethod
    def views(self, seed: int, epoch: int, ids: Ints, heights: Ints, widths: Ints, size: int, alpha_std: float) -> Views:
        """The views of N samples. ids: int64 (N,). alpha_std: standard deviation of alphas, unless the geometry is not random."""

    def shapes(self, heights: Ints, widths: Ints, size: int) -> Ints:
        """Height and width of each image's views: int64 (N, 2)."""
        return np.full((len(heights), 2), size, np.int64)

    def groups_of(self, heights: Ints, widths: Ints, size: int) -> tuple[ViewGroup, ...]:
        """The views of each image by their size, in the order of `views`. The images' views must have equal shapes."""
        height, width = self.shapes(heights[:1], widths[:1], size)[0].tolist()
        return (ViewGroup(self.crops, height, width),)

    @abstractmethod
    def check(self, size: int) -> None:
        """Raise UserError if the geometry cannot be used for crops of `size`."""

    @abstractmethod
    def scaled(self, size: int, nominal: int) -> Self:
        """This geometry for crops of `size`: in proportion, if the present one is for crops of `nominal`."""


@dataclass(frozen=True)
class ScaleJitter(Geometry):
    """The short side is uniform on the integers low..high, the position of the crop is uniform, and half the crops are mirrored.

    He et al. 2015, "Deep residual learning for image recognition", section 3.4, after Simonyan and Zisserman 2015, section 3.1.
    """

    low: int = sampling.SCALE[0]
    high: int = sampling.SCALE[1]
    random: ClassVar[bool] = True

    def views(self, seed: int, epoch: int, ids: Ints, heights: Ints, widths: Ints, size: int, alpha_std: float) -> Views:
        drawn = sampling.draw(seed, epoch, ids, heights, widths, (self.low, self.high), size, alpha_std)
        return Views(sampling.windows(drawn, heights, widths, size), drawn.flip, drawn.alphas)

    def check(self, size: int) -> None:
        if not size <= self.low <= self.high:
            raise UserError(f"scale {self.low} {self.high}: needs image size ({size}) <= low <= high")

    def scaled(self, size: int, nominal: int) -> ScaleJitter:
        return ScaleJitter(sampling.short_at(self.low, size, nominal), sampling.short_at(self.high, size, nominal))


@dataclass(frozen=True)
class RandomResizedCrop(Geometry):
    """A window with uniform area, log-uniform aspect ratio and uniform position; half the views are mirrored.

    Szegedy et al. 2015, "Going deeper with convolutions", section 6, in the form of torchvision.transforms.RandomResizedCrop.
    area: range of the window's fraction of the image. aspect: range of its width divided by its height.
    """

    area: tuple[float, float] = (0.08, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    random: ClassVar[bool] = True

    def views(self, seed: int, epoch: int, ids: Ints, heights: Ints, widths: Ints, size: int, alpha_std: float) -> Views:
        windows, flip = sampling.resized_crops(seed, epoch, ids, heights, widths, self.area, self.aspect)
        return Views(windows, flip, sampling.alphas(seed, epoch, ids, alpha_std))

    def check(self, size: int) -> None:
        if not 0 < self.area[0] <= self.area[1] <= 1:
            raise UserError(f"area {self.area[0]} {self.area[1]}: needs 0 < low <= high <= 1")
        if not 0 < self.aspect[0] <= self.aspect[1]:
            raise UserError(f"aspect {self.aspect[0]} {self.aspect[1]}: needs 0 < low <= high")

    def scaled(self, size: int, nominal: int) -> RandomResizedCrop:
        return self


@dataclass(frozen=True)
class MultiCrop(Geometry):
    """Random resized crops of several sizes, each with draws of its own, for self-supervised learning.

    Caron et al. 2020, "Unsupervised learning of visual features by contrasting cluster assignments" (SwAV), section 3.2; Caron
    et al. 2021, "Emerging properties in self-supervised vision transformers" (DINO), which has these areas by default.
    groups: for each size, the side in pixels, the number of views, and the range of the window's fraction of the image. Views are
    numbered over all groups. The draws of a view depend on its number and its area, not on how many others there are.
    """

    groups: tuple[tuple[int, int, tuple[float, float]], ...] = ((224, 2, (0.4, 1.0)), (96, 8, (0.05, 0.4)))
    random: ClassVar[bool] = True

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(count for _, count, _ in self.groups)

    @property
    def crops(self) -> int:
        return sum(self.counts)

    @property
    def largest(self) -> int:
        """The side of the largest views, pixels."""
        return max(side for side, _, _ in self.groups)

    def views(self, seed: int, epoch: int, ids: Ints, heights: Ints, widths: Ints, size: int, alpha_std: float) -> Views:
        aspect, found, first = RandomResizedCrop().aspect, [], 0
        for _, count, area in self.groups:
            numbers = np.tile(np.arange(first, first + count), len(ids))
            samples, tall, wide = (array.repeat(count) for array in (ids, heights, widths))
            windows, flip = sampling.resized_crops(seed, epoch, samples, tall, wide, area, aspect, numbers)
            found.append(Views(windows, flip, sampling.alphas(seed, epoch, samples, alpha_std, numbers)))
            first += count
        return by_image(found, len(ids))

    def groups_of(self, heights: Ints, widths: Ints, size: int) -> tuple[ViewGroup, ...]:
        return tuple(ViewGroup(count, side, side) for side, count, _ in self.groups)

    def check(self, size: int) -> None:
        try:
            valid = bool(self.groups) and all(
                min(side, count) >= 1 and 0 < low <= high <= 1 and int(side) == side and int(count) == count
                for side, count, (low, high) in self.groups
            )
        except (TypeError, ValueError):
            valid = False
        if not valid:
            raise UserError(
                f"MultiCrop {self.groups!r}: needs groups of (side, views, (low, high)) with 0 < low <= high <= 1",
                "for example ((224, 2, (0.3, 1.0)), (96, 8, (0.05, 0.3)))",
            )

    def scaled(self, size: int, nominal: int) -> MultiCrop:
        return self


@dataclass(frozen=True)
class PaddedCrop(Geometry):
    """A crop at a uniform position of the image with `padding` zeros on each side; half the crops are mirrored.

    The augmentation of CIFAR in He et al. 2015, section 4.2, after Lee et al. 2015, "Deeply-supervised nets", in the form of
    torchvision.transforms.RandomCrop(size, padding) and RandomHorizontalFlip. First, the short side is resized to the side of the
    crop; CIFAR's images have that size already.
    """

    padding: int = 4
    random: ClassVar[bool] = True

    def views(self, seed: int, epoch: int, ids: Ints, heights: Ints, widths: Ints, size: int, alpha_std: float) -> Views:
        drawn = sampling.draw(seed, epoch, ids, heights, widths, (size, size), size, alpha_std, self.padding)
        out_heights, out_widths = sampling.resized(heights, widths, drawn.short)
        top, left = np.clip(drawn.top, 0, out_heights - size), np.clip(drawn.left, 0, out_widths - size)
        shift = np.stack([top - drawn.top, left - drawn.left], axis=1)
        shift[drawn.flip, 1] *= -1  # views are mirrored before they are shifted
        windows = sampling.windows(drawn._replace(top=top, left=left), heights, widths, size)
        return Views(windows, drawn.flip, drawn.alphas, shift)

    def check(self, size: int) -> None:
        if not 0 <= self.padding < size:
            raise UserError(f"padding {self.padding}: needs 0 <= padding < image size ({size})")

    def scaled(self, size: int, nominal: int) -> PaddedCrop:
        return PaddedCrop(min(round(self.padding * size / nominal), size - 1))


@dataclass(frozen=True)
class _Resized(Geometry):
    """Base class of the geometries that resize the short side to `short`."""

    short: int = sampling.EVAL_SHORT

    def check(self, size: int) -> None:
        if self.short < size:
            raise UserError(f"the evaluation's short side ({self.short}) must be at least the image size ({size})")

    def scaled(self, size: int, nominal: int) -> Self:
        return replace(self, short=sampling.short_at(self.short, size, nominal))


@dataclass(frozen=True)
class CentreCrop(_Resized):
    """Short side resized to `short`; the central crop, and its mirror image if `mirrored` (test-time flips).

    Single-crop testing as in Krizhevsky et al. 2012.
    """

    mirrored: bool = False

    @property
    def crops(self) -> int:
        return 2 if self.mirrored else 1

    def views(self, seed: int, epoch: int, ids: Ints, heights: Ints, widths: Ints, size: int, alpha_std: float) -> Views:
        windows = self._windows(heights, widths, size)
        return _views(np.stack([windows] * self.crops, axis=1), np.arange(self.crops) > 0)

    def _windows(self, heights: Ints, widths: Ints, size: int) -> npt.NDArray[np.float64]:
        return sampling.windows(sampling.centre(heights, widths, self.short, size), heights, widths, size)


@dataclass(frozen=True)
class TorchvisionCrop(CentreCrop):
    """The central crop of torchvision's and timm's evaluation, for weights that were published with it: Resize, CenterCrop.

    It differs from `CentreCrop` by less than a pixel: the long side is rounded down, so each axis has its own scale, and the
    corner is rounded half to even. square: both sides are resized to `short`, whatever the aspect ratio (timm: squash).
    """

    square: bool = False

    def _windows(self, heights: Ints, widths: Ints, size: int) -> npt.NDArray[np.float64]:
        sides = np.stack([heights, widths], axis=1)
        out = np.full_like(sides, self.short) if self.square else self.short * sides // sides.min(axis=1, keepdims=True)
        low = np.rint((out - size) / 2)
        return np.concatenate([low * sides / out, np.minimum((low + size) * sides / out, sides)], axis=1)


@dataclass(frozen=True)
class TenCrop(_Resized):
    """Short side resized to `short`; the four corner crops and the central one, and the mirror images of these five.

    Krizhevsky et al. 2012, "ImageNet classification with deep convolutional neural networks", section 4.1; He et al. 2015,
    section 3.4. In torchvision.transforms.TenCrop's order: top left, top right, bottom left, bottom right, centre, then mirrored.
    """

    @property
    def crops(self) -> int:
        return 10

    def views(self, seed: int, epoch: int, ids: Ints, heights: Ints, widths: Ints, size: int, alpha_std: float) -> Views:
        centre = sampling.centre(heights, widths, self.short, size)
        bottom, right = (side - size for side in sampling.resized(heights, widths, centre.short))
        zero = np.zeros_like(bottom)
        corners = ((zero, zero), (zero, right), (bottom, zero), (bottom, right), (centre.top, centre.left))
        five = [sampling.windows(centre._replace(top=top, left=left), heights, widths, size) for top, left in corners]
        return _views(np.stack([*five, *five], axis=1), np.arange(10) >= 5)


@dataclass(frozen=True)
class WholeImage(_Resized):
    """The whole image with its short side resized to `short`, and its mirror image if `mirrored`: fully convolutional testing.

    Simonyan and Zisserman 2015, "Very deep convolutional networks for large-scale image recognition", section 3.2; He et al.
    2015, section 3.4. Views differ in size: the sides are floor(side * short / min(height, width) + 1/2) pixels.

    Of an image that is longer than MAX_ASPECT times its short side, the view is the central part of that length: a strip of
    3 x 65500 pixels, resized to a short side of 640, would have 9 billion pixels.
    """

    mirrored: bool = False

    @property
    def crops(self) -> int:
        return 2 if self.mirrored else 1

    def views(self, seed: int, epoch: int, ids: Ints, heights: Ints, widths: Ints, size: int, alpha_std: float) -> Views:
        sides = np.stack([heights, widths], axis=1)
        low = (sides - _limited(sides)) / 2
        whole = np.concatenate([low, sides - low], axis=1)
        return _views(np.stack([whole] * self.crops, axis=1), np.arange(self.crops) > 0)

    def shapes(self, heights: Ints, widths: Ints, size: int) -> Ints:
        heights, widths = _limited(np.stack([heights, widths], axis=1)).T
        return np.stack(sampling.resized(heights, widths, self.short), axis=1)

    def check(self, size: int) -> None:
        if self.short < 1:
            raise UserError(f"the short side must be at least 1, not {self.short}")


def _limited(sides: Ints) -> Ints:
    """The part of each image that `WholeImage` takes, without changing its short side. sides: int64 (N, 2), pixels."""
    return np.minimum(sides, MAX_ASPECT * sides.min(axis=1, keepdims=True))


def choose_geometry(name: str, scale: Sequence[int] | None, size: int, area: Sequence[float] | None = None) -> Geometry:
    """A training geometry by its name in GEOMETRIES: scale jitter, random resized crops, or crops of an image padded by 4 pixels.

    scale: range of the short side for scale jitter, pixels; by default 256..480 for crops of 224, in proportion for others.
    area: range of the crop's fraction of the image for random resized crops. Raises UserError for a range that the geometry does
    not use.
    """
    for field, given, owner in (("scale", scale, "jitter"), ("area", area, "rrc")):
        if given and name != owner:
            raise UserError(f"`{field}` belongs to `geometry` {owner}", "leave it out")
    if name == "jitter":
        return ScaleJitter(*scale) if scale else ScaleJitter().scaled(size, sampling.CROP)
    if name == "rrc":
        return RandomResizedCrop((area[0], area[1])) if area else RandomResizedCrop()
    return PaddedCrop()


def by_image(found: Sequence[Views], count: int) -> Views:
    """The views of N = `count` images by several geometries, with those of an image adjacent. They must not be shifted."""
    columns = [
        np.concatenate([one.reshape(count, -1, *one.shape[1:]) for one in arrays], axis=1)
        for arrays in zip(*((one.windows, one.flip, one.alphas) for one in found), strict=True)
    ]
    windows, flip, alphas = (column.reshape(-1, *column.shape[2:]) for column in columns)
    return Views(windows, flip, alphas)


def _views(windows: npt.NDArray[np.float64], flip: npt.NDArray[np.bool_]) -> Views:
    """Views without lighting. windows: (N, crops, 4). flip: (crops,), the same for each image."""
    count, crops, _ = windows.shape
    return Views(windows.reshape(-1, 4), np.tile(flip, count), np.zeros((count * crops, 3), np.float32))
