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
from typing import NamedTuple

import numpy as np
import torch

from ..batch import BatchOf
from ..buffers import BufferPool, split, to_device
from ..errors import UserError
from ..pixels.decoder import CorruptImageError, Decoder, Pixels
from ..pixels.resample import KERNELS
from ..plan.geometry import Geometry, Views, by_image
from ..plan.order import ByShape
from ..plan.sampling import Ints
from ..spec import LoaderSpec, check
from ..store.shards import ShardSet
from ..store.waiting import set_timeout
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
        set_timeout(spec.read_timeout)
        self._device = torch.device(spec.device)
        self.spec, self.view_specs, self._kernel = spec, tuple(view_specs), KERNELS[spec.interpolation]
        self.shards = ShardSet(spec.data, spec.split, spec.cache, spec.cache_gb, verify=spec.verify)
        self.shards.check_fields(spec.fields)
        heights, widths = self.shards.image_sizes(np.arange(len(self.shards)))
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
        heights, widths = self.shards.image_sizes(ids)
        shapes = [view_spec.geometry.shapes(heights, widths, view_spec.size)[0] for view_spec in self.view_specs]
        crops = [view_spec.geometry.crops for view_spec in self.view_specs]
        return sum(3 * count * math.prod(shape.tolist()) for count, shape in zip(crops, shapes, strict=True))

    def _plan(self, ids: Ints) -> _Job:
        """The windows and the buffer of a batch. Its images are read ahead."""
        self.shards.read_ahead(ids, bool(self.spec.fields))
        heights, widths = self.shards.image_sizes(ids)
        views = [view_spec.geometry.views(0, 0, ids, heights, widths, view_spec.size, 0.0) for view_spec in self.view_specs]
        shapes = [
            (len(one.flip), *view_spec.geometry.shapes(heights[:1], widths[:1], view_spec.size)[0].tolist(), 3)
            for view_spec, one in zip(self.view_specs, views, strict=True)
        ]
        images, tensor = self._buffers.acquire_parts(shapes, np.uint8)
        return _Job(ids, heights, widths, by_image(views, len(ids)), images, tensor, shapes, [{} for _ in ids])

    def _fill(self, decoder: Decoder, job: _Job, indices: range) -> None:
        """Make all views of some images of a batch. Runs in a thread."""
        crops = [view_spec.geometry.crops for view_spec in self.view_specs]
        for index in indices:
            sample, its = int(job.ids[index]), slice(index * sum(crops), (index + 1) * sum(crops))
            out = [images[index * count : (index + 1) * count] for images, count in zip(job.images, crops, strict=True)]
            try:
                if self.spec.fields:
                    encoded, job.fields[index] = self.shards.read_with_fields(sample)
                else:
                    encoded = self.shards.read(sample)
                size = int(job.heights[index]), int(job.widths[index])
                decoder.make_groups(encoded, *size, job.views.windows[its], job.views.flip[its], out, self._kernel)
            except CorruptImageError as error:
                raise UserError(f"{self.shards.locate(sample)}: cannot be decoded ({error})", "make the shards again") from error

    def _finish(self, job: _Job) -> MultiViewBatch:
        """The batch on the device, without waiting for the copy."""
        labels = to_device(self.shards.samples["label"][job.ids].astype(np.int64), self._device)
        images = split(self._buffers.to_device(job.tensor), job.shapes)
        fields = {name: [found.get(name, b"") for found in job.fields] for name in self.spec.fields}
        return MultiViewBatch(dict(zip(self.view_specs, images, strict=True)), labels, job.ids, fields)


@dataclass
class _Job:
    """A batch in progress. views: of all ViewSpecs, those of an image adjacent. images, shapes: one per ViewSpec.

    `images` are parts of the flat `tensor`. fields: as in `BatchPlan`.
    """

    ids: Ints
    heights: Ints
    widths: Ints
    views: Views
    images: list[Pixels]
    tensor: torch.Tensor
    shapes: list[tuple[int, ...]]
    fields: list[dict[str, bytes]]
