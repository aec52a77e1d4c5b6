"""Views by several geometries in one pass over a split: each image is read and decoded once for all of them.

This is for evaluation with several testing schemes: centre crops, ten crops, and whole images at several scales. Threads decode
the smallest region that contains all windows of an image, and resample each window. They prepare the next batches while the model
runs.

The views are uint8 pixels without normalization, so several models can share a pass, each with its own normalization.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ..buffers import BufferPool, to_device
from ..errors import UserError
from ..loader import BatchOf
from ..pixels.decoder import CorruptImageError, Decoder, Pixels, resample_windows
from ..pixels.resample import BILINEAR, KERNELS, Kernel
from ..plan import sampling
from ..plan.geometry import Geometry, Views
from ..plan.order import ByShape
from ..plan.sampling import Ints
from ..spec import LoaderSpec, check, check_device
from ..store.shards import ShardSet
from .pool import WorkerPool

# Limit for the views of a batch, if it has more than one image. Whole images at five scales take 7 MB per image.
MAX_BATCH_BYTES = 256 << 20
_CHUNK = 4  # images per task of a thread; few, as each image has many views


class ViewSpec(NamedTuple):
    """One kind of view. size: side of the crops, pixels; the views of whole images have their own sizes."""

    geometry: Geometry
    size: int


class MultiViewBatch(BatchOf[dict[ViewSpec, torch.Tensor]]):
    """A batch of N images, with the views of several geometries. A tuple of images, labels and ids.

    images: for each ViewSpec, uint8 (N * crops, H, W, 3) on the spec's device; the views of an image are adjacent.
    labels: int64 (N,), same device. ids: int64 (N,), NumPy: the samples' indices in the split. fields: as in `Batch`.
    """


class MultiViewLoader:
    """An iterable over a split that yields each sample once, with the views of all specs.

    Within a batch, the views of all images have the same size. A batch has `batch_size` images, or fewer if it is the last one of
    its size or is limited by `MAX_BATCH_BYTES`.
    """

    def __init__(self, spec: LoaderSpec, view_specs: Sequence[ViewSpec]) -> None:
        """spec: for evaluation; its geometry and image size are not used. Raises UserError for a spec that cannot be loaded."""
        if spec.engine not in ("auto", "cpu"):
            raise UserError(
                f"`engine` {spec.engine} makes only one kind of view in a pass",
                "for several schemes, scales or image sizes leave `engine` out, or use cpu",
            )
        for view_spec in view_specs:
            check(replace(spec, geometry=view_spec.geometry, image_size=view_spec.size))
            if view_spec.geometry.random or spec.world_size > 1:
                raise ValueError("several geometries in one pass are only for evaluation, in one process")
        check_device(spec.device)
        self._device = torch.device(spec.device)
        self.spec, self.view_specs, self._kernel = spec, tuple(view_specs), KERNELS[spec.interpolation]
        self.shards = ShardSet(spec.data, spec.split, spec.cache, spec.cache_gb, verify=spec.verify)
        self.shards.check_fields(spec.fields)
        heights, widths = self._sizes(np.arange(len(self.shards)))
        shapes = [view_spec.geometry.shapes(heights, widths, view_spec.size) for view_spec in view_specs]
        self._order = ByShape(np.concatenate(shapes, axis=1))
        self._buffers = BufferPool(spec.device)
        if len(self._order.runs()) > 1:
            self.shards.check_cache()  # samples of one size are scattered over all shards

    def __len__(self) -> int:
        """Batches."""
        return sum(1 for _ in self._batches())

    def __iter__(self) -> Iterator[MultiViewBatch]:
        pool = WorkerPool(self.spec.threads, _CHUNK, Decoder, self._fill)
        try:
            for ids in self._batches():
                pool.submit(self._plan(ids), len(ids))
                if len(pool) > self.spec.prefetch:
                    yield self._finish(pool.next())
            while len(pool):
                yield self._finish(pool.next())
        finally:
            pool.close()
            self.shards.close()

    def _batches(self) -> Iterator[Ints]:
        """Each batch's samples, int64 (N,)."""
        start = 0
        for count in self._order.runs().tolist():
            run = self._order.samples(0, np.arange(start, start + count))
            step = max(1, min(self.spec.batch_size, MAX_BATCH_BYTES // self._bytes_per_image(run[:1])))
            yield from (run[low : low + step] for low in range(0, count, step))
            start += count

    def _bytes_per_image(self, ids: Ints) -> int:
        """The size of all views of one sample. ids: int64 (1,)."""
        heights, widths = self._sizes(ids)
        shapes = [view_spec.geometry.shapes(heights, widths, view_spec.size)[0] for view_spec in self.view_specs]
        crops = [view_spec.geometry.crops for view_spec in self.view_specs]
        return sum(3 * count * math.prod(shape.tolist()) for count, shape in zip(crops, shapes, strict=True))

    def _sizes(self, ids: Ints) -> tuple[Ints, Ints]:
        records = self.shards.samples[ids]
        return records["height"].astype(np.int64), records["width"].astype(np.int64)

    def _plan(self, ids: Ints) -> _Job:
        """The windows and the buffer of a batch."""
        heights, widths = self._sizes(ids)
        views = [view_spec.geometry.views(0, 0, ids, heights, widths, view_spec.size, 0.0) for view_spec in self.view_specs]
        shapes = [
            (len(one.flip), *view_spec.geometry.shapes(heights[:1], widths[:1], view_spec.size)[0].tolist(), 3)
            for view_spec, one in zip(self.view_specs, views, strict=True)
        ]
        memory, tensor = self._buffers.acquire((sum(map(math.prod, shapes)),), np.uint8)
        regions = common_regions(views, heights, widths, [shape[1:3] for shape in shapes], self._kernel)
        return _Job(ids, heights, widths, views, regions, _split(memory, shapes), tensor, shapes, [{} for _ in ids])

    def _fill(self, decoder: Decoder, job: _Job, indices: range) -> None:
        """Make all views of some images of a batch. Runs in a thread."""
        for index in indices:
            sample = int(job.ids[index])
            # The decoder gets the common region as a window at scale 1. It adds a margin.
            window = job.regions[index : index + 1].astype(np.float64)
            rows, columns = (job.regions[index, 2:] - job.regions[index, :2]).tolist()
            try:
                if self.spec.fields:
                    encoded, job.fields[index] = self.shards.read_with_fields(sample)
                else:
                    encoded = self.shards.read(sample)
                size = int(job.heights[index]), int(job.widths[index])
                pixels, box = decoder.decode_region(encoded, *size, window, (rows, columns))
            except CorruptImageError as error:
                raise UserError(f"{self.shards.locate(sample)}: cannot be decoded ({error})", "make the shards again") from error
            for view_spec, views, images in zip(self.view_specs, job.views, job.images, strict=True):
                crops = slice(index * view_spec.geometry.crops, (index + 1) * view_spec.geometry.crops)
                resample_windows(pixels, box, views.windows[crops], views.flip[crops], self._kernel, images[crops])

    def _finish(self, job: _Job) -> MultiViewBatch:
        """The batch on the device, without waiting for the copy."""
        labels = to_device(self.shards.samples["label"][job.ids].astype(np.int64), self._device)
        images = _split(self._buffers.to_device(job.tensor), job.shapes)
        fields = {name: [found.get(name, b"") for found in job.fields] for name in self.spec.fields}
        return MultiViewBatch(dict(zip(self.view_specs, images, strict=True)), labels, job.ids, fields)


@dataclass
class _Job:
    """A batch in progress. regions: int64 (N, 4), the region of each image to decode: top, left, bottom, right.

    views, images, shapes: one per ViewSpec. `images` are parts of the flat `tensor`, so that a single copy moves all of them to
    the device. fields: as in `BatchPlan`.
    """

    ids: Ints
    heights: Ints
    widths: Ints
    views: list[Views]
    regions: Ints
    images: list[Pixels]
    tensor: torch.Tensor
    shapes: list[tuple[int, ...]]
    fields: list[dict[str, bytes]]


def common_regions(
    views: Sequence[Views], heights: Ints, widths: Ints, sizes: Sequence[tuple[int, ...]], kernel: Kernel = BILINEAR
) -> Ints:
    """The smallest region of each image with all source pixels that its views need: int64 (N, 4) of top, left, bottom, right.

    views: of the same N images by several geometries. sizes: height and width of each geometry's views.
    """
    count = len(heights)
    found: list[npt.NDArray[np.int64]] = []
    for one, size in zip(views, sizes, strict=True):
        crops = len(one.flip) // count
        sides = np.repeat(heights, crops), np.repeat(widths, crops)
        regions = sampling.regions(one.windows, *sides, (size[0], size[1]), kernel.support)
        found.append(regions.reshape(count, crops, 4))
    every = np.concatenate(found, axis=1)
    return np.concatenate([every[..., :2].min(axis=1), every[..., 2:].max(axis=1)], axis=1)


def _split(memory: Any, shapes: Sequence[tuple[int, ...]]) -> list[Any]:
    """Consecutive parts of a flat array or tensor, in the given shapes."""
    ends = np.cumsum([math.prod(shape) for shape in shapes]).tolist()
    return [memory[end - math.prod(shape) : end].reshape(shape) for end, shape in zip(ends, shapes, strict=True)]
