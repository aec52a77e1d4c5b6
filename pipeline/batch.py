"""What a loader returns (`Batch`), and what an engine has to make for it (`BatchPlan`)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Generic, NamedTuple, Self, TypeVar

import numpy as np
import torch

from .pixels.decoder import Pixels
from .plan.geometry import ViewGroup, Views
from .plan.sampling import Ints

Images = TypeVar("Images")


class _Three(NamedTuple, Generic[Images]):
    images: Images
    labels: torch.Tensor
    ids: Ints


class BatchOf(_Three[Images]):
    """A tuple of images, labels and ids. `fields` is an attribute only, so that it can be unpacked into three."""

    fields: dict[str, list[bytes]]

    def __new__(cls, images: Images, labels: torch.Tensor, ids: Ints, fields: dict[str, list[bytes]] | None = None) -> Self:
        batch = super().__new__(cls, images, labels, ids)  # type: ignore[type-var]
        batch.fields = fields or {}
        return batch

    def _replace(self, **changes: Any) -> Self:
        """A copy with other images, labels, ids or fields."""
        return type(self)(**{"images": self.images, "labels": self.labels, "ids": self.ids, "fields": self.fields, **changes})

    __replace__ = _replace  # of copy.replace, since Python 3.13


class Batch(BatchOf[Any]):
    """This rank's range of a global batch: N images, with `geometry.crops` views each. A tuple of images, labels and ids.

    - images: (N * crops, 3, H, W) of the spec's dtype, on its device, in channels-last memory unless the spec says otherwise; the
      views of an image are adjacent. With `MultiCrop`, a tuple of such tensors, one for each of its groups.
    - labels: int64 (N,), same device.
    - ids: int64 (N,), NumPy: the samples' indices in the split.
    - fields: for each name in the spec's `fields`, the content of that member of each sample: N bytes objects, empty where a
      sample lacks it.
    """


class BatchRange(NamedTuple):
    """One rank's range of one global batch: positions [low, high) of the epoch. stop: where the global batch ends."""

    epoch: int
    low: int
    high: int
    stop: int


class BatchPlan(NamedTuple):
    """What an engine has to make for a batch range.

    ids: int64 (N,). views: V = N * crops. heights, widths: int64 (N,), source pixels. groups: the views of each image by size.
    fields: of each sample, by name; empty until its image is read.
    """

    batch_range: BatchRange
    ids: Ints
    views: Views
    heights: Ints
    widths: Ints
    groups: tuple[ViewGroup, ...]
    fields: list[dict[str, bytes]]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of each view; with `MultiCrop`, of those of the first group."""
        return self.groups[0].height, self.groups[0].width

    @property
    def shapes(self) -> list[tuple[int, int, int, int]]:
        """The shapes of the groups' pixels: (N * crops, H, W, 3) each."""
        return [(len(self.ids) * crops, height, width, 3) for crops, height, width in self.groups]

    @property
    def sizes(self) -> Ints:
        """Height and width of each view: int64 (V, 2)."""
        of_one = [group[1:] for group in self.groups for _ in range(group.crops)]
        return np.tile(np.array(of_one, np.int64), (len(self.ids), 1))

    def rows(self, index: int, count: int = 1) -> list[slice]:
        """The rows of `views` that belong to the image at `index`, by group; of one group, those of `count` images."""
        crops = [group.crops * count for group in self.groups]
        ends = [index * sum(crops) // count + end for end in accumulate(crops)]
        return [slice(end - its, end) for its, end in zip(crops, ends, strict=True)]

    def empty_views(self) -> list[Pixels]:
        """Memory for the views of one image: for each group, uint8 (crops, H, W, 3)."""
        return [np.empty((*group, 3), np.uint8) for group in self.groups]

    def images_of(self, index: int, images: Sequence[Any], count: int = 1) -> list[Any]:
        """The part of the groups' images, (N * crops, ...) each, that belongs to `count` images of the plan, from `index` on."""
        return [all_[index * crops : (index + count) * crops] for all_, (crops, _, _) in zip(images, self.groups, strict=True)]

    def by_group(self) -> list[Views]:
        """The views of each group, of all images."""
        if len(self.groups) == 1:
            return [self.views]
        rows = [np.arange(its.start, its.stop) for its in self.rows(0)]
        crops, starts = sum(map(len, rows)), np.arange(len(self.ids))[:, None]
        return [Views(*(column[(starts * crops + its).reshape(-1)] for column in self.views.arrays)) for its in rows]


def check_in_order(plan: BatchPlan, batch_range: BatchRange) -> None:
    """Raise RuntimeError unless the engine's next batch is the requested one, which it is not if two iterations take turns."""
    if plan.batch_range != batch_range:
        raise RuntimeError("two iterations run over one loader at the same time; open a loader for each")
