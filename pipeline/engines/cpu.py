"""The CPU engine: WebDataset shards, libjpeg-turbo and compiled resampling in threads that release the GIL.

Worker threads fill recycled buffers in chunks of images, `prefetch` batches ahead. They read an image, decode the region that its
crop needs, and resample it into the batch. If the batch stays on the CPU, the same thread applies lighting and
normalization while the view is still in the processor's cache. For a GPU, uint8 pixels are written to pinned memory and copied on
a separate CUDA stream, so that the copy overlaps the training step. Lighting and normalization then run on the GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..batch import Batch, BatchPlan, BatchRange, check_in_order
from ..buffers import split
from ..loader import Loader
from ..pixels.decoder import Decoder, Pixels
from ..pixels.normalize import lighting, stored_dtype, translate
from ..pixels.resample import BILINEAR
from ..plan.geometry import Views
from ..spec import LoaderSpec
from .pool import WorkerPool
from .ranges import Piece, RangeReader
from .warm_up import warm_up

_CHUNK = 16  # images per task of a thread: enough to hide the overhead of a task, few enough to keep all threads busy


def open(spec: LoaderSpec) -> CpuLoader:
    """A loader of `spec`. Raises UserError for a bad spec or a device that does not exist."""
    loader = CpuLoader(spec)
    warm_up(loader.kernel)
    return loader


@dataclass
class _Job:
    """A batch in progress. images: the buffers of its views, (N * crops, H, W, 3) for each group. tensor: shares their memory.
    reading: its images, if they are read by ranges."""

    plan: BatchPlan
    images: list[Any]
    tensor: torch.Tensor
    reading: list[Future[Piece]] = field(default_factory=list)


@dataclass
class _Worker:
    """The memory of one thread. pixels: for each group, uint8 (images * crops, H, W, 3), views before normalization."""

    decoder: Decoder = field(default_factory=Decoder)
    pixels: list[Pixels] = field(default_factory=list)

    def memory(self, plan: BatchPlan, images: int) -> list[Pixels]:
        """Memory for the pixels of a number of images."""
        shapes = [(images * crops, height, width, 3) for crops, height, width in plan.groups]
        if [pixels.shape for pixels in self.pixels] != shapes:
            self.pixels = [np.empty(shape, np.uint8) for shape in shapes]
        return self.pixels


class CpuLoader(Loader):
    """Keeps `prefetch` batches in progress, across epochs. `close` ends its threads."""

    engine = "cpu"

    def __init__(self, spec: LoaderSpec) -> None:
        super().__init__(spec)
        self._normalize_in_threads = torch.device(spec.device).type == "cpu" and spec.dtype != torch.uint8
        self._pool: WorkerPool[_Job, _Worker] = WorkerPool(spec.threads, _CHUNK, _Worker, self._fill)
        self._ranges = RangeReader(self)
        self._schedule: Iterator[BatchRange] = iter(())

    def close(self) -> None:
        super().close()
        self._ranges.close()
        self._pool.close()

    def ready(self) -> int:
        return self._pool.ready()

    def _make_batch(self, batch_range: BatchRange) -> Batch:
        if not len(self._pool):
            self._schedule = self.upcoming(batch_range)
        while len(self._pool) <= self.spec.prefetch:
            self._start(next(self._schedule))
        job = self._pool.next()
        check_in_order(job.plan, batch_range)
        images = job.tensor.view(self.spec.dtype) if self._normalize_in_threads else self.buffers.to_device(job.tensor)
        return self.finish(split(images, job.plan.shapes), job.plan)

    def _start(self, batch_range: BatchRange) -> None:
        """Plan a batch and hand it to the threads."""
        plan = self.plan(batch_range)
        dtype = stored_dtype(self.spec.dtype) if self._normalize_in_threads else np.uint8
        reading = self._ranges.start(plan) if self.shards.by_ranges else []
        self._pool.submit(_Job(plan, *self.buffers.acquire_parts(plan.shapes, dtype), reading), len(plan.ids))

    def _fill(self, worker: _Worker, job: _Job, indices: range) -> None:
        """Make the views of some images of a batch. Runs in a thread."""
        plan = job.plan
        if not self._normalize_in_threads:
            self._make(worker.decoder, job, indices, plan.images_of(indices.start, job.images, len(indices)))
            return
        together = max(1, _CHUNK // self.crops) if len(plan.groups) == 1 else 1  # bounds the memory
        for first in range(indices.start, indices.stop, together):
            some = range(first, min(first + together, indices.stop))
            pixels = worker.memory(plan, len(some))
            self._make(worker.decoder, job, some, pixels)
            out = plan.images_of(first, job.images, len(some))
            for group in zip(pixels, plan.rows(first, len(some)), out, strict=True):
                self._normalize(plan.views, *group)

    def _make(self, decoder: Decoder, job: _Job, indices: range, out: Sequence[Pixels]) -> None:
        """Make the pixels of images, those that can be by one call. out: for each group, uint8 (images * crops, H, W, 3)."""
        plan = job.plan
        for index in indices if job.reading else self._make_at_once(decoder, plan, indices, out):
            views = plan.images_of(index - indices.start, out)
            if not job.reading or not self._ranges.make_views(decoder, plan, index, job.reading[index], views):
                self.make_or_replace(decoder, plan, index, views)

    def _make_at_once(self, decoder: Decoder, plan: BatchPlan, indices: range, out: Sequence[Pixels]) -> Sequence[int]:
        """Make the images that are in the page cache and that `jpeg.decode` decodes, in two calls without the GIL.

        One by one, each would hold the GIL for 15 us. Returns the indices of the others.
        """
        its = slice(indices.start, indices.stop)
        if len(plan.groups) > 1 or self.kernel is not BILINEAR or self.spec.fields:
            return indices
        views = plan.rows(indices.start, len(indices))[0]
        windows, flip = plan.views.windows[views], plan.views.flip[views]
        try:
            if (encoded := self.shards.read_cached(plan.ids[its])) is None:
                return indices
            left = encoded.ready.copy()
            decoder.make_several(encoded.data, encoded.ends, plan.heights[its], plan.widths[its], windows, flip, out[0], left)
        except MemoryError:  # one by one, only an image that is too large is replaced
            return indices
        return (indices.start + np.flatnonzero(left | ~encoded.ready)).tolist()

    def _normalize(self, views: Views, pixels: Pixels, rows: slice, out: Any) -> None:
        """Shift, lighting and normalization of views of one size. rows: of `views`."""
        if views.shift is not None:
            pixels = translate(pixels, views.shift[rows])
        size = pixels.shape[1], pixels.shape[2]
        self.normalizer(size)(pixels, lighting(views.alphas[rows], self.lighting_basis), out)
