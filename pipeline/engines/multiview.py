"""Pictures by several geometries in one pass over a split: each image is read and decoded once for all of them.

For testing, where a net sees centre crops, ten crops and whole images at five scales of the same images. The CPU engine's code
makes them: threads without the GIL decode the region that all windows of an image need together, which is the whole image where a
whole image is among them, resample each window, and go on with the next batches while the net works.

The pictures are plain pixels: whoever feeds several nets from one pass has a colour tail for each.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ..buffers import BufferPool, to_device
from ..errors import UserError
from ..pixels.decoder import CorruptImageError, Decoder, Pixels, resample_windows
from ..plan import sampling
from ..plan.geometry import Geometry, Views
from ..plan.order import ByShape
from ..plan.sampling import Ints
from ..spec import LoaderSpec, check, check_device
from ..store.shards import ShardSet

MOST_BYTES = 256 << 20  # of a batch's pictures, unless one image's are more: whole images at five scales take 7 MB an image
_CHUNK = 4  # images that a thread makes at a time: each makes many pictures


class ViewSpec(NamedTuple):
    """One kind of pictures of an image. size: of crops, pixels; whole images have sizes of their own."""

    geometry: Geometry
    size: int


class MultiViewBatch(NamedTuple):
    """A batch of N images as several geometries show them.

    pictures: of each look uint8 (N * crops, H, W, 3) on the spec's device, an image's next to each other.
    labels: int64 (N,), same device. ids: int64 (N,), NumPy: the samples' places in the split.
    """

    pictures: dict[ViewSpec, torch.Tensor]
    labels: torch.Tensor
    ids: Ints


class MultiViewLoader:
    """Iterates over a split by several looks; each sample comes once. No batch holds images of which a look's sizes differ.

    Batches have `batch_size` images, fewer at the end of those of one size and where more would exceed `MOST_BYTES`.
    """

    def __init__(self, spec: LoaderSpec, view_specs: Sequence[ViewSpec]) -> None:
        """spec: for evaluation; its geometry and image size do not matter. Raises UserError for one that cannot be had."""
        if spec.engine not in ("auto", "cpu"):
            raise UserError(
                f"--engine {spec.engine} makes pictures of one kind in a pass; with several schemes, scales or image sizes leave "
                "--engine out, or give cpu"
            )
        for look in view_specs:
            check(replace(spec, geometry=look.geometry, image_size=look.size))
            if look.geometry.random or spec.world_size > 1:
                raise ValueError("several geometries in a pass are for evaluation in one process")
        check_device(spec.device)
        self._device = torch.device(spec.device)
        self.spec, self.view_specs = spec, tuple(view_specs)
        self.shards = ShardSet(spec.data, spec.split, spec.cache, spec.cache_gb)
        heights, widths = self._sizes(np.arange(len(self.shards)))
        self._order = ByShape(np.concatenate([look.geometry.shapes(heights, widths, look.size) for look in view_specs], axis=1))
        self._buffers = BufferPool(spec.device)
        self._own = threading.local()  # each thread's decoder
        if len(self._order.runs()) > 1:
            self.shards.check_cache()  # samples of one size come from any shard

    def __len__(self) -> int:
        """Batches."""
        return sum(1 for _ in self._parts())

    def __iter__(self) -> Iterator[MultiViewBatch]:
        threads = ThreadPoolExecutor(self.spec.threads, "cropfeed")
        jobs: deque[_Job] = deque()
        try:
            for ids in self._parts():
                jobs.append(self._begin(ids, threads))
                if len(jobs) > self.spec.prefetch:
                    yield self._finish(jobs.popleft())
            while jobs:
                yield self._finish(jobs.popleft())
        finally:
            threads.shutdown(cancel_futures=True)
            self.shards.close()

    def _parts(self) -> Iterator[Ints]:
        """Each batch's samples, int64 (N,)."""
        start = 0
        for count in self._order.runs().tolist():
            run = self._order.samples(0, np.arange(start, start + count))
            step = max(1, min(self.spec.batch_size, MOST_BYTES // self._picture_bytes(run[:1])))
            yield from (run[low : low + step] for low in range(0, count, step))
            start += count

    def _picture_bytes(self, ids: Ints) -> int:
        """Of the pictures of one sample, int64 (1,)."""
        heights, widths = self._sizes(ids)
        shapes = [look.geometry.shapes(heights, widths, look.size)[0] for look in self.view_specs]
        return sum(
            3 * look.geometry.crops * math.prod(shape.tolist()) for look, shape in zip(self.view_specs, shapes, strict=True)
        )

    def _sizes(self, ids: Ints) -> tuple[Ints, Ints]:
        records = self.shards.samples[ids]
        return records["height"].astype(np.int64), records["width"].astype(np.int64)

    def _begin(self, ids: Ints, threads: ThreadPoolExecutor) -> _Job:
        """Plan a batch and hand its images to the threads."""
        heights, widths = self._sizes(ids)
        views = [look.geometry.views(0, 0, ids, heights, widths, look.size, 0.0) for look in self.view_specs]
        shapes = [
            (len(one.flip), *look.geometry.shapes(heights[:1], widths[:1], look.size)[0].tolist(), 3)
            for look, one in zip(self.view_specs, views, strict=True)
        ]
        memory, tensor = self._buffers.acquire((sum(map(math.prod, shapes)),), np.uint8)
        regions = common_regions(views, heights, widths, [shape[1:3] for shape in shapes])
        job = _Job(ids, heights, widths, views, regions, _split(memory, shapes), tensor, shapes)
        for first in range(0, len(ids), _CHUNK):
            places = range(first, min(first + _CHUNK, len(ids)))
            job.chunks.append(threads.submit(self._fill, job, places))
        return job

    def _fill(self, job: _Job, places: range) -> None:
        """Make all pictures of some images of a batch. Runs in a thread."""
        if not hasattr(self._own, "decoder"):
            self._own.decoder = Decoder()
        for place in places:
            sample = int(job.ids[place])
            # To the decoder the common region is a window that keeps its size, to which it adds a margin.
            window = job.regions[place : place + 1].astype(np.float64)
            rows, columns = (job.regions[place, 2:] - job.regions[place, :2]).tolist()
            try:
                pixels, box = self._own.decoder.decoded(
                    self.shards.read(sample), int(job.heights[place]), int(job.widths[place]), window, (rows, columns)
                )
            except CorruptImageError as error:
                raise UserError(f"{self.shards.where(sample)}: cannot be decoded ({error}); make the shards again") from error
            for look, views, pictures in zip(self.view_specs, job.views, job.pictures, strict=True):
                crops = slice(place * look.geometry.crops, (place + 1) * look.geometry.crops)
                resample_windows(pixels, box, views.windows[crops], views.flip[crops], pictures[crops])

    def _finish(self, job: _Job) -> MultiViewBatch:
        """The batch on the device, without waiting for that."""
        for chunk in job.chunks:
            chunk.result()
        labels = to_device(self.shards.samples["label"][job.ids].astype(np.int64), self._device)
        pictures = _split(self._buffers.to_device(job.tensor), job.shapes)
        return MultiViewBatch(dict(zip(self.view_specs, pictures, strict=True)), labels, job.ids)


@dataclass
class _Job:
    """A batch in the making. regions: int64 (N, 4), what to decode of each image: top, left, bottom, right. views, pictures,
    shapes: of each look; `pictures` are parts of `tensor`, which is flat, so that one copy takes all to the device."""

    ids: Ints
    heights: Ints
    widths: Ints
    views: list[Views]
    regions: Ints
    pictures: list[Pixels]
    tensor: torch.Tensor
    shapes: list[tuple[int, ...]]
    chunks: list[Future[None]] = field(default_factory=list)


def common_regions(views: Sequence[Views], heights: Ints, widths: Ints, sizes: Sequence[tuple[int, ...]]) -> Ints:
    """The smallest rectangle of each of N images that holds what resampling all of its views needs: int64 (N, 4) of top, left,
    bottom, right. views: of the same images by several geometries. sizes: height and width of each geometry's pictures.
    """
    count = len(heights)
    found: list[npt.NDArray[np.int64]] = []
    for one, size in zip(views, sizes, strict=True):
        crops = len(one.flip) // count
        regions = sampling.regions(one.windows, np.repeat(heights, crops), np.repeat(widths, crops), (size[0], size[1]))
        found.append(regions.reshape(count, crops, 4))
    every = np.concatenate(found, axis=1)
    return np.concatenate([every[..., :2].min(axis=1), every[..., 2:].max(axis=1)], axis=1)


def _split(memory: Any, shapes: Sequence[tuple[int, ...]]) -> list[Any]:
    """Parts of a flat array or tensor, one behind the other."""
    ends = np.cumsum([math.prod(shape) for shape in shapes]).tolist()
    return [memory[end - math.prod(shape) : end].reshape(shape) for end, shape in zip(ends, shapes, strict=True)]
