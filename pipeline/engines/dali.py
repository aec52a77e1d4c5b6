"""The DALI engine: one graph for CPU and GPU.

DALI gets the plan's samples and windows. From region-addressable shards it gets small JPEGs, cut at the crop, so it decodes only
what a view needs. With profile "original" it gets whole files, and DALI itself decodes only the region. DALI decodes (`mixed` on
a GPU), resamples each window, mirrors by swapping the window's left and right ends, and outputs uint8 NHWC memory, which torch
uses without a copy. Lighting and normalization follow on the same device.

Two rare cases are handled on the CPU:
- A view at the border of its image that is downscaled more than fourfold. Where the filter reaches beyond the image, DALI repeats
  the last pixel and Pillow leaves it out. The outermost pixels of the view differ by up to 1/8 of the step from the last pixel to
  its neighbours. Such views are made by `pixels.decoder` and pass DALI's graph unchanged, as binary PPM. (For less downscaling,
  only images with a high-contrast frame of one or two pixels exceed a difference of 4 of 255.) With bicubic interpolation, this
  also holds for views at the border that are enlarged.
- A sample that DALI cannot decode. DALI then fails the whole batch, without naming the sample. The engine finds the sample,
  replaces it, and restarts the pipeline. If it finds no corrupt sample, DALI has rejected one that the other engines accept, or
  the GPU has a fault. The views of all batches in flight are then made on the CPU, up to `MAX_RESTARTS` times in succession.
"""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from nvidia.dali import Pipeline, fn, types
from nvidia.dali.tensors import TensorCPU, TensorListCPU

from ..batch import Batch, BatchPlan, BatchRange, check_in_order
from ..jpeg.region import NO_TABLE, Bytes
from ..loader import Loader
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
from ..spec import LoaderSpec
from ..store.waiting import DaemonPool

# External inputs: name, DALI type, number of dimensions of one sample.
INPUTS = (
    ("encoded", types.UINT8, 1),
    ("roi_start", types.FLOAT, 3),  # (crops, passes, 2): for each view of the image, see `_passes`
    ("roi_end", types.FLOAT, 3),
    ("size", types.FLOAT, 3),
)
SLICE_INPUTS = (("region_start", types.INT32, 1), ("region_end", types.INT32, 1))
CUT_PROFILES = ("lossless", "compact")  # profiles of the manifest with region-addressable images
MAX_RESTARTS = 3  # for failures without a corrupt sample, unless `CALM` batches lie between two of them
CALM = 1000
MAX_REDUCTION = 4  # views at an image's border that are downscaled further are made on the CPU
log = logging.getLogger("cropfeed")


def open(spec: LoaderSpec) -> DaliLoader:
    """A loader of `spec`. Raises UserError for a bad spec or a device that does not exist."""
    return DaliLoader(spec)


def graph(
    sources: Any, crops: Sequence[int], gpu: bool, slices: bool, hw_decoder_load: float, bicubic: bool = False
) -> list[Any]:
    """Define the graph. sources: its inputs, `INPUTS` and, with slices, `SLICE_INPUTS`. crops: views of each size. Returns an
    output for each size: uint8 (height, width, 3) for one view, else (crops, height, width, 3).

    slices: decode only the region between region_start and region_end; roi coordinates are then relative to region_start.
    The decoded region includes the support of the resampling filter around the windows, in whole pixels, so that resampling it
    equals resampling the whole image. Orientation tags are ignored, as in every published ImageNet result.
    """
    encoded, roi_start, roi_end, size, *region = sources
    options: dict[str, Any] = {
        "device": "mixed" if gpu else "cpu",
        "output_type": types.RGB,
        "adjust_orientation": False,
        "jpeg_fancy_upsampling": True,  # nvJPEG's default repeats chroma instead of interpolating it as libjpeg-turbo does
        "hw_decoder_load": hw_decoder_load,
        "affine": False,  # DALI would pin its threads to cores by NVML, which fails in virtual machines
    }
    if slices:
        pixels = fn.decoders.image_slice(encoded, start=region[0], end=region[1], axes=[0, 1], **options)
    else:
        pixels = fn.decoders.image(encoded, **options)
    views = [pixels] * sum(crops)
    for view in range(len(views)):
        for i in range(2 if bicubic else 1):
            views[view] = fn.resize(
                views[view],
                size=size[view, i],
                roi_start=roi_start[view, i],
                roi_end=roi_end[view, i],
                dtype=types.UINT8,
                interp_type=types.INTERP_CUBIC if bicubic else types.INTERP_LINEAR,
            )
    by_size = [views[end - count : end] for count, end in zip(crops, accumulate(crops), strict=True)]
    return [its[0] if len(its) == 1 else fn.stack(*its) for its in by_size]


def build_pipeline(source: Any, batch_size: int, spec: LoaderSpec, slices: bool) -> Pipeline:
    """A pipeline with `graph`. It calls `source()` for the inputs of each batch. A GPU is needed only from `build()` on."""
    gpu = torch.device(spec.device).type == "cuda"
    device_id = (torch.device(spec.device).index or 0) if gpu else None
    pipe = Pipeline(batch_size, spec.threads, device_id, prefetch_queue_depth=spec.prefetch)
    inputs = (*INPUTS, *SLICE_INPUTS) if slices else INPUTS
    with pipe:
        sources = fn.external_source(
            source,
            num_outputs=len(inputs),
            dtype=[dtype for _, dtype, _ in inputs],
            ndim=[dimensions for _, _, dimensions in inputs],
            no_copy=True,  # `_Feed` keeps the memory
        )
        crops = spec.geometry.counts
        pipe.set_outputs(*graph(sources, crops, gpu, slices, spec.hw_decoder_load, spec.interpolation == "bicubic"))
    return pipe


class DaliLoader(Loader):
    """Runs one DALI pipeline on the plan. The pipeline continues across epochs, so that the end of an epoch costs no time."""

    engine = "dali"

    def __init__(self, spec: LoaderSpec, cuts: bool | None = None, slices: bool | None = None) -> None:
        """cuts: give DALI JPEGs that are cut at the crop. Default: if the shards are region-addressable.
        slices: let DALI decode only a region of what it gets. Default: except for cut JPEGs on a GPU, because the GPU's hardware
        decoder only decodes whole images.
        """
        super().__init__(spec)
        gpu = torch.device(spec.device).type == "cuda"
        self.cuts = self.shards.manifest.profile in CUT_PROFILES if cuts is None else cuts
        self.slices = not (gpu and self.cuts) if slices is None else slices
        self.failed: set[BatchRange] = set()  # DALI failed on these ranges: their views are made on the CPU
        self._restarts, self._calm = 0, 0  # after failures without a corrupt sample; batches since the last one
        self._pipe: Pipeline | None = None
        self._feed: _Feed | None = None

    def close(self) -> None:
        feed = self._feed
        self._drop_pipeline()
        if feed:
            feed.close()
        super().close()  # last, as the feed's thread can begin to prefetch a block of shards

    def _make_batch(self, batch_range: BatchRange) -> Batch:
        outputs = self._run(batch_range)
        assert self._feed
        plan = self._feed.in_flight.popleft()
        check_in_order(plan, batch_range)
        # from_dlpack passes torch's current stream to DALI, which makes that stream wait for its own.
        pixels = [torch.from_dlpack(views.as_tensor()) for views in outputs]
        return self.finish([its.reshape(shape) for its, shape in zip(pixels, plan.shapes, strict=True)], plan)

    def _run(self, batch_range: BatchRange) -> Any:
        """DALI's next batch. If it fails, corrupt samples are marked and the pipeline restarts at `batch_range`. Raises DALI's
        RuntimeError if that does not help."""
        while True:
            pipe = self._pipe or self._start(batch_range)
            stream = torch.cuda.current_stream(self.spec.device) if pipe.device_id is not None else None
            try:
                views = pipe.run(stream)
            except RuntimeError as error:
                log.warning("%s, %s: DALI has failed: %s", self.spec.data, self.spec.split, _in_one_line(error))
                assert self._feed
                failed, feed = list(self._feed.in_flight), self._feed
                self._drop_pipeline()
                feed.close()
                if not self._mark_corrupt_of(failed) and not self._restart_without(failed):
                    raise
            else:
                self._calm += 1
                return views

    def _restart_without(self, plans: list[BatchPlan]) -> bool:
        """Have the views of these batches made on the CPU, as none of their samples is corrupt. Returns whether to restart."""
        ranges = {plan.batch_range for plan in plans}
        self._restarts = 1 if self._calm >= CALM else self._restarts + 1
        if self._restarts > MAX_RESTARTS or ranges <= self.failed:
            return False
        self.failed, self._calm = ranges, 0
        return True

    def _mark_corrupt_of(self, plans: list[BatchPlan]) -> bool:
        """Mark the samples that cannot be decoded. Returns whether there are any."""
        found = False
        for plan in plans:
            views = plan.empty_views()
            for index in range(len(plan.ids)):
                try:
                    self.make_views(Decoder(), plan, index, views)
                except CorruptImageError as error:
                    self.substitutes.mark(plan.batch_range.epoch, int(plan.ids[index]), str(error))
                    found = True
        return found

    def _start(self, batch_range: BatchRange) -> Pipeline:
        """A new pipeline whose first batch is `batch_range`."""
        largest = -(-self.spec.batch_size // self.spec.world_size)
        self._feed = _Feed(self, batch_range)
        self._pipe = build_pipeline(self._feed, largest, self.spec, self.slices)
        self._pipe.build()
        return self._pipe

    def _drop_pipeline(self) -> None:
        self._pipe = self._feed = None


class _Feed:
    """What DALI calls for its inputs, in the thread that trains. They are made one batch ahead, in another thread, and passed
    without a copy. DALI reads their memory until it has returned the batch, but does not keep it alive. The pipeline owns its
    feed, so the memory also outlives a pipeline that is dropped while it runs.

    in_flight: the plans of the batches that DALI has not returned yet.
    """

    def __init__(self, loader: DaliLoader, batch_range: BatchRange) -> None:
        threads, self._loader = loader.spec.threads, loader
        self._schedule = loader.upcoming(batch_range)
        self._thread = DaemonPool(1, "cropfeed-feed")
        self._cutters = DaemonPool(threads, "cropfeed-cut") if threads > 1 else None
        self.in_flight: deque[BatchPlan] = deque()
        self._kept: deque[Any] = deque(maxlen=2 * loader.spec.prefetch + 1)
        self._next = self._thread.submit(self._make, next(self._schedule))

    def __call__(self) -> tuple[Any, ...]:
        """The inputs of the graph for the next batch: N tensors of bytes, then tensors with N rows."""
        plan, inputs, memory = self._next.result()
        self._next = self._thread.submit(self._make, next(self._schedule))
        self.in_flight.append(plan)
        self._kept.append(memory)
        return inputs

    def close(self) -> None:
        """End the threads."""
        self._thread.close()
        if self._cutters:
            self._cutters.close()

    def _make(self, batch_range: BatchRange) -> tuple[BatchPlan, tuple[Any, ...], tuple[Any, ...]]:
        """The plan of a batch, its inputs as DALI's tensors, and the memory that these use."""
        plan = self._loader.plan(batch_range)
        inputs, count, threads = _BatchInputs(self._loader, plan), len(plan.ids), self._loader.spec.threads
        if self._cutters:
            bounds = [count * i // threads for i in range(threads + 1)]
            for part in [self._cutters.submit(inputs.encode, *ends) for ends in pairwise(bounds)]:
                part.result()  # raises errors of the threads
        else:
            inputs.encode(0, count)
        encoded, *arrays = memory = inputs.arrays()
        return plan, ([TensorCPU(data, "") for data in encoded], *(TensorListCPU(array, "") for array in arrays)), memory


class _BatchInputs:
    """DALI's inputs for one batch: an encoded stream for each image, and the windows of its views in that stream."""

    def __init__(self, loader: DaliLoader, plan: BatchPlan) -> None:
        count = len(plan.ids)
        self._loader, self._plan = loader, plan
        self._encoded: list[Bytes] = [np.empty(0, np.uint8)] * count
        self._boxes = np.empty((count, 4), np.int64)  # top, left, height, width: which part of its image each stream shows
        self._on_cpu = self._needs_cpu()

    def encode(self, first: int, last: int) -> None:
        """Make the streams of images [first, last). Thread-safe for disjoint ranges."""
        for index in range(first, last):
            while True:
                try:
                    self._encoded[index] = self._encode(index)
                    break
                except CorruptImageError as error:
                    self._loader.replace(self._plan, index, str(error))
                    self._on_cpu[index] = self._needs_cpu()[index]

    def _encode(self, index: int) -> Bytes:
        plan, box = self._plan, self._boxes[index]
        height, width = int(plan.heights[index]), int(plan.widths[index])
        if self._on_cpu[index]:
            views = plan.empty_views()
            self._loader.make_views(Decoder(), plan, index, views)
            stacked = stack_vertically([view for its in views for view in its])
            box[:] = 0, 0, *stacked.shape[:2]
            return to_ppm(stacked)
        data = self._loader.read_planned(plan, index)
        if has_4_components(data):  # which nvJPEG does not convert to RGB as Pillow does
            self._on_cpu[index] = True
            return self._encode(index)
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
        inputs = self._passes(roi_start, roi_end, sizes, decoded)
        region = (start.astype(np.int32), end.astype(np.int32)) if self._loader.slices else ()
        return self._encoded, *(each.astype(np.float32).reshape(count, crops, -1, 2) for each in inputs), *region

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


def _in_one_line(error: RuntimeError) -> str:
    """DALI's error without the places in its code and in ours."""
    text = " ".join(str(error).partition("Stacktrace")[0].split())
    return re.sub(r", which was used in the pipeline definition .*? encountered", "", text)


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
