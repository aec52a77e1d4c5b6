"""The CPU engine: WebDataset shards, libjpeg-turbo and compiled resampling in threads that hold no GIL.

A batch is memory lent by a pool. Its images are made in chunks by worker threads, `prefetch` batches ahead: an image's region is
cut from its mapped shard, decoded, resampled into the batch and, if the batch stays on the CPU, sent through the colour tail
while it is in the cache. For a GPU, plain pixels are made in pinned memory and copied on a stream of their own, so that the copy
runs beside the training step; the colour tail follows on the GPU.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..loader import Batch, BatchPlan, BatchRange, Loader, check_turn
from ..pixels.decoder import Decoder
from ..pixels.normalize import lighting, stored_dtype, translate
from ..spec import LoaderSpec

_CHUNK = 16  # images that a thread makes at a time: enough to forget the hand-over, few enough to keep all threads busy


def open(spec: LoaderSpec) -> CpuLoader:
    """A loader of `spec`. Raises UserError for a bad spec or a device that is not there."""
    return CpuLoader(spec)


@dataclass
class _Job:
    """A batch in the making. images: what the pictures are written to, (V, H, W, 3). tensor: the same memory."""

    plan: BatchPlan
    images: Any
    tensor: torch.Tensor
    chunks: list[Future[None]] = field(default_factory=list)


class CpuLoader(Loader):
    """Keeps `prefetch` batches in the making, across epochs, in a thread pool that ends with `close`."""

    engine = "cpu"

    def __init__(self, spec: LoaderSpec) -> None:
        super().__init__(spec)
        self._normalize_in_threads = torch.device(spec.device).type == "cpu" and spec.dtype != torch.uint8
        self._own = threading.local()  # each thread's decoder and pixels
        self._threads: ThreadPoolExecutor | None = None
        self._schedule: Iterator[BatchRange] = iter(())
        self._jobs: deque[_Job] = deque()

    def close(self) -> None:
        super().close()
        self._jobs.clear()
        if self._threads:
            self._threads.shutdown(cancel_futures=True)
            self._threads = None

    def ready(self) -> int:
        return sum(all(chunk.done() for chunk in job.chunks) for job in self._jobs.copy())

    def _make(self, batch_range: BatchRange) -> Batch:
        if not self._jobs:
            self._schedule = self.upcoming(batch_range)
        while len(self._jobs) <= self.spec.prefetch:
            self._jobs.append(self._begin(next(self._schedule)))
        job = self._jobs.popleft()
        check_turn(job.plan, batch_range)
        for chunk in job.chunks:
            chunk.result()
        images = job.tensor.view(self.spec.dtype) if self._normalize_in_threads else self.buffers.to_device(job.tensor)
        return self.finish(images, job.plan)

    def _begin(self, batch_range: BatchRange) -> _Job:
        """Hand a part's chunks to the threads."""
        self._threads = self._threads or ThreadPoolExecutor(self.spec.threads, "cropfeed")
        plan = self.plan(batch_range)
        shape = (len(plan.views.flip), *plan.size, 3)
        job = _Job(plan, *self.buffers.acquire(shape, stored_dtype(self.spec.dtype) if self._normalize_in_threads else np.uint8))
        for first in range(0, len(plan.ids), _CHUNK):
            places = range(first, min(first + _CHUNK, len(plan.ids)))
            job.chunks.append(self._threads.submit(self._fill, job, places))
        return job

    def _fill(self, job: _Job, places: range) -> None:
        """Make the pictures of some images of a batch. Runs in a thread."""
        own = self._own
        if not hasattr(own, "decoder"):
            own.decoder, own.pixels = Decoder(), np.empty(0, np.uint8)
        plan, crops = job.plan, self.crops
        shape = (crops, *plan.size, 3)
        if self._normalize_in_threads and own.pixels.shape != shape:
            own.pixels = np.empty(shape, np.uint8)
        for place in places:
            views = slice(place * crops, (place + 1) * crops)
            pictures = own.pixels if self._normalize_in_threads else job.images[views]
            self.make_or_replace(own.decoder, plan, place, pictures)
            if self._normalize_in_threads:
                if plan.views.shift is not None:
                    pictures = translate(pictures, plan.views.shift[views])
                self.normalizer(plan.size).batch(pictures, lighting(plan.views.alphas[views], self.basis), job.images[views])
