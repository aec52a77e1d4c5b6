"""The CPU engine: WebDataset shards, libjpeg-turbo and compiled resampling in threads that release the GIL.

Worker threads fill recycled buffers in chunks of images, `prefetch` batches ahead. They read an image, decode the region that its
crop needs, and resample it into the batch. If the batch stays on the CPU, the same thread applies lighting and
normalization while the view is still in the processor's cache. For a GPU, uint8 pixels are written to pinned memory and copied on
a separate CUDA stream, so that the copy overlaps the training step. Lighting and normalization then run on the GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    """The memory of one thread. pixels: for each group, uint8 (crops, H, W, 3), the views of one image before normalization."""

    decoder: Decoder = field(default_factory=Decoder)
    pixels: list[Pixels] = field(default_factory=list)


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
        shapes = [(*group, 3) for group in plan.groups]
        if self._normalize_in_threads and [pixels.shape for pixels in worker.pixels] != shapes:
            worker.pixels = [np.empty(shape, np.uint8) for shape in shapes]
        for index in indices:
            images = plan.images_of(index, job.images)
            views = worker.pixels if self._normalize_in_threads else images
            if not job.reading or not self._ranges.make_views(worker.decoder, plan, index, job.reading[index], views):
                self.make_or_replace(worker.decoder, plan, index, views)
            if self._normalize_in_threads:
                for pixels, rows, out in zip(worker.pixels, plan.rows(index), images, strict=True):
                    self._normalize(pixels, plan.views, rows, out)

    def _normalize(self, pixels: Pixels, views: Views, rows: slice, out: Any) -> None:
        """Shift, lighting and normalization of an image's views of one size. rows: of `views`."""
        if views.shift is not None:
            pixels = translate(pixels, views.shift[rows])
        size = pixels.shape[1], pixels.shape[2]
        self.normalizer(size).batch(pixels, lighting(views.alphas[rows], self.lighting_basis), out)
