"""What the DALI engine feeds to its graph: encoded images and the windows of their views, made one batch ahead in threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from nvidia.dali import types
from nvidia.dali.tensors import TensorCPU, TensorListCPU

from ..batch import BatchPlan, BatchRange
from ..jpeg.region import NO_TABLE, Bytes
from ..pixels.decoder import (
    CorruptImageError,
    Decoder,
    Pixels,
    check_scans,
    cut_windows,
    decode_by_pillow,
    has_4_components,
    has_size,
    joint_window,
    why_corrupt,
)
from ..plan import sampling
from ..plan.sampling import Ints
from ..store.waiting import DaemonPool
from .pool import WorkerPool

if TYPE_CHECKING:
    from .dali import DaliLoader

# External inputs: DALI type, and number of dimensions of one sample. Each takes 50 us of the training thread per batch.
INPUTS = (
    (types.UINT8, 1),  # encoded image
    (types.FLOAT, 4),  # (crops, passes, 3, 2): the start and the end of each window, and the size of its view, see `_passes`
)
SLICE_INPUT = (types.INT32, 2)  # the start and the end of the region to decode
MAX_REDUCTION = 4  # views at an image's border that are downscaled further are made on the CPU
_CHUNK = 16  # images per task of a thread


class Input:
    """What DALI calls for its inputs, in the training thread, which only hands over finished tensor lists: they are made one
    batch ahead, in other threads, and passed without a copy. DALI reads their memory until it has returned the batch. The
    pipeline owns this object, so the memory also outlives a pipeline that is dropped while it runs.

    in_flight: the plans of the batches that DALI has not returned yet.
    """

    def __init__(self, loader: DaliLoader, batch_range: BatchRange) -> None:
        self._loader = loader
        self._schedule = loader.upcoming(batch_range)
        self._thread = DaemonPool(1, "cropfeed-input")
        self._pool: WorkerPool[BatchInputs, Decoder] = WorkerPool(loader.spec.threads, _CHUNK, Decoder, _fill)
        self._next: Future[tuple[BatchPlan, tuple[Any, ...]]] | None = None
        self.in_flight: deque[BatchPlan] = deque()
        # Dropped by our thread: it takes 0.2 ms, and DALI's threads would wait for the interpreter's lock for each image.
        self._kept: deque[tuple[Any, ...]] = deque(maxlen=2 * loader.spec.prefetch + 1)
        self.prepare()

    def __call__(self) -> tuple[Any, ...]:
        """The inputs of the graph for the next batch: tensor lists of N tensors."""
        plan, inputs = self.prepare().result()
        self._next = None
        self.in_flight.append(plan)
        return inputs

    def prepare(self) -> Future[tuple[BatchPlan, tuple[Any, ...]]]:
        """Begin to make the next inputs, unless that has begun."""
        self._next = self._next or self._thread.submit(self._make)
        return self._next

    def close(self) -> None:
        """End the threads."""
        self._thread.close()
        self._pool.close()

    def _make(self) -> tuple[BatchPlan, tuple[Any, ...]]:
        """The plan of the next batch, and its inputs as DALI's tensor lists."""
        plan = self._loader.plan(next(self._schedule))
        self._pool.submit(BatchInputs(self._loader, plan), len(plan.ids))
        encoded, *arrays = memory = self._pool.next().arrays()
        tensors = [TensorCPU(data, "") for data in encoded]
        images = TensorListCPU(tensors, "", contiguous=False)  # type: ignore[call-overload]  # DALI's stubs lack it; else it copies
        inputs = images, *(TensorListCPU(array, "") for array in arrays)
        self._kept.append((inputs, memory))
        return plan, inputs


def _fill(decoder: Decoder, inputs: BatchInputs, indices: range) -> None:
    for index in indices:
        inputs.encode(decoder, index)


class BatchInputs:
    """DALI's inputs for one batch: an encoded stream for each image, and the windows of its views in that stream."""

    def __init__(self, loader: DaliLoader, plan: BatchPlan) -> None:
        count = len(plan.ids)
        self._loader, self._plan = loader, plan
        self._encoded: list[Bytes] = [np.empty(0, np.uint8)] * count
        self._boxes = np.empty((count, 4), np.int64)  # top, left, height, width: which part of its image each stream shows
        self._on_cpu = self._needs_cpu()

    def encode(self, decoder: Decoder, index: int) -> None:
        """Make the stream of an image. Thread-safe for different images."""
        while True:
            try:
                self._encoded[index] = self._encode(decoder, index)
                return
            except CorruptImageError as error:
                self._loader.replace(self._plan, index, str(error))
                self._on_cpu[index] = self._needs_cpu()[index]

    def _encode(self, decoder: Decoder, index: int) -> Bytes:
        plan, box = self._plan, self._boxes[index]
        height, width = int(plan.heights[index]), int(plan.widths[index])
        if self._on_cpu[index]:
            views = plan.empty_views()
            self._loader.make_views(decoder, plan, index, views)
            stacked = stack_vertically([view for its in views for view in its])
            box[:] = 0, 0, *stacked.shape[:2]
            return to_ppm(stacked)
        data = self._loader.read_planned(plan, index)
        if has_4_components(data):  # which nvJPEG does not convert to RGB as Pillow does
            self._on_cpu[index] = True
            return self._encode(decoder, index)
        box[:] = 0, 0, height, width
        if data[:2].tobytes() == b"\xff\xd8" and not has_size(data, height, width):  # DALI would crop another image
            decode_by_pillow(data, (height, width))  # raises CorruptImageError
        if self._loader.cuts:
            piece = np.empty(len(data), np.uint8)
            kernel = self._loader.kernel
            windows, size = joint_window(height, width, plan.views.windows[self._views(index)], plan.groups, kernel)
            length = cut_windows(data, height, width, windows, *size, kernel.support, piece, box)
            if length > 0:
                return piece[:length]
            if length != NO_TABLE and (reason := why_corrupt(data)):
                raise CorruptImageError(reason)
        check_scans(data)
        return data

    def _needs_cpu(self) -> npt.NDArray[np.bool_]:
        """For which images the views are made on the CPU: bool (N,)."""
        return at_border(self._plan, self._loader.spec.interpolation) | (self._plan.batch_range in self._loader.failed)

    def _views(self, index: int) -> slice:
        return slice(index * self._loader.crops, (index + 1) * self._loader.crops)

    def arrays(self) -> tuple[Any, ...]:
        """The inputs of the graph, once all streams are made."""
        plan, crops = self._plan, self._loader.crops
        count, sizes = len(plan.ids), plan.sizes
        windows, flip = plan.views.windows.copy(), plan.views.flip.copy()
        heights, widths = plan.heights.copy(), plan.widths.copy()
        for index in np.flatnonzero(self._on_cpu).tolist():  # the stream is its finished views, stacked vertically
            rows, columns = sizes[self._views(index)].T
            bottoms = np.cumsum(rows)
            windows[self._views(index)] = np.stack([bottoms - rows, 0 * rows, bottoms, columns], axis=1)
            flip[self._views(index)] = False
            heights[index], widths[index] = self._boxes[index, 2:]
        support = self._loader.kernel.support
        regions = sampling.regions(windows, heights.repeat(crops), widths.repeat(crops), sizes, support)
        regions = regions.reshape(count, crops, 4)
        corner = self._boxes[:, :2]
        start, end = regions[:, :, :2].min(axis=1) - corner, regions[:, :, 2:].max(axis=1) - corner
        origin = (corner + start if self._loader.slices else corner).repeat(crops, axis=0)
        roi_start, roi_end = (windows[:, ends] - origin for ends in (slice(0, 2), slice(2, 4)))
        roi_start[flip, 1], roi_end[flip, 1] = roi_end[flip, 1], roi_start[flip, 1]
        decoded = (end - start if self._loader.slices else self._boxes[:, 2:])[:, 0]
        passes = [each.reshape(count, crops, -1, 2) for each in self._passes(roi_start, roi_end, sizes, decoded)]
        region = (np.stack([start, end], axis=1).astype(np.int32),) if self._loader.slices else ()
        return self._encoded, np.stack(passes, axis=3).astype(np.float32), *region

    def _passes(self, roi_start: Any, roi_end: Any, sizes: Ints, decoded: Ints) -> tuple[Any, Any, Any]:
        """The start and the end of the window and the size, each (V, passes, 2), of each call of fn.resize.

        Bicubic is resampled horizontally, then vertically, with 8 bits between, as by `pixels.resample`: DALI does not clip
        between its own passes. roi_start, roi_end, sizes: (V, 2). decoded: (N,), rows of what DALI decodes.
        """
        if self._loader.spec.interpolation == "bilinear":
            return roi_start, roi_end, sizes
        (rows, columns), zero, tall = sizes.T, np.zeros(len(roi_start)), decoded.repeat(self._loader.crops)
        starts = [zero, roi_start[:, 1], roi_start[:, 0], zero]
        ends = [tall, roi_end[:, 1], roi_end[:, 0], columns]
        return np.stack(starts, axis=1), np.stack(ends, axis=1), np.stack([tall, columns, rows, columns], axis=1)


def at_border(plan: BatchPlan, interpolation: str = "bilinear") -> npt.NDArray[np.bool_]:
    """Which images have a view at the image's border that DALI makes differently: bool (N,). It is downscaled by more than
    `MAX_REDUCTION`, or enlarged by the bicubic filter, which reaches two pixels far."""
    crops = len(plan.views.flip) // len(plan.ids)
    low, high = plan.views.windows[:, :2], plan.views.windows[:, 2:]
    scale = (high - low) / plan.sizes
    sides = np.stack([plan.heights, plan.widths], axis=1).repeat(crops, axis=0)
    reaches: npt.NDArray[np.bool_] = (scale > MAX_REDUCTION) & ((low < scale) | (high > sides - scale))
    if interpolation == "bicubic":
        reaches |= (scale < 0.99) & ((low < 2) | (high > sides - 2))
    return np.asarray(reaches.reshape(len(plan.ids), -1).any(axis=1))


def stack_vertically(views: Sequence[Pixels]) -> Pixels:
    """Views, uint8 (H, W, 3) each, in one image that is as wide as the widest."""
    width = max(view.shape[1] for view in views)
    return np.concatenate([np.pad(view, ((0, 0), (0, width - view.shape[1]), (0, 0))) for view in views])


def to_ppm(pixels: npt.NDArray[np.uint8]) -> Bytes:
    """Pixels, uint8 (H, W, 3), as a binary PPM, uint8 (bytes,)."""
    header = f"P6\n{pixels.shape[1]} {pixels.shape[0]}\n255\n".encode()
    return np.concatenate([np.frombuffer(header, np.uint8), pixels.reshape(-1)])
