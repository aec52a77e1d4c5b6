"""The DALI engine: one graph for CPU and GPU.

What enters DALI are the plan's samples and windows and, where the shards open at the crop, small JPEGs cut from mapped shards:
all that DALI decodes is what a picture needs. Whole files (profile "original") are decoded at the region by DALI itself. DALI
decodes (`mixed` on a GPU), resamples each window, mirrors by swapping its left and right ends, and hands over uint8 NHWC memory,
which torch sees without a copy; the colour tail follows on the same device.

Two things are done on the host, where they are needed, which is rarely:
- A picture at its image's border that is reduced more than fourfold. Where the filter reaches beyond the image, DALI repeats the
  image's last pixel and Pillow leaves it out. That shows in the picture's outermost pixels, by up to 1/8 of the step from the
  last pixel to those beside it. Such pictures are made by `pixels.decoder` and pass DALI's graph unchanged, as binary PPM.
  (Reduced less, it takes a frame of a pixel or two in full contrast around the image to exceed 4 of 255.)
- DALI fails a whole batch for one sample that it cannot decode, without saying which. It is sought and replaced, and the pipeline
  starts again. Where there is none, DALI is stricter than the other engines, and the host makes what DALI had in hand.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from nvidia.dali import Pipeline, fn, types

from ..jpeg.region import _NO_TABLE, Bytes
from ..loader import Batch, BatchPlan, BatchRange, Loader, check_turn
from ..pixels.decoder import CorruptImageError, Decoder, cut_windows, why_corrupt
from ..plan import sampling
from ..spec import LoaderSpec

# External inputs: name, DALI type, dimensions of one sample.
INPUTS = (
    ("encoded", types.UINT8, 1),
    ("roi_start", types.FLOAT, 2),  # a row for each of an image's views
    ("roi_end", types.FLOAT, 2),
    ("size", types.FLOAT, 1),
)
SLICE_INPUTS = (("region_start", types.INT32, 1), ("region_end", types.INT32, 1))
CUT_PROFILES = ("lossless", "compact")  # of the manifest, whose images open at the crop
MOST_REDUCED = 4  # at an image's border


def open(spec: LoaderSpec) -> DaliLoader:
    """A loader of `spec`. Raises UserError for a bad spec or a device that is not there."""
    return DaliLoader(spec)


def graph(sources: Any, crops: int, gpu: bool, slices: bool, hw_decoder_load: float) -> Any:
    """The graph's output from its inputs, `INPUTS` and, if it slices, `SLICE_INPUTS`: uint8 (height, width, 3), one picture, or
    (crops, height, width, 3).

    slices: decode the region between region_start and region_end, where the roi's pixels are counted from, instead of all.
    What is decoded ends on whole pixels with the resampling filter's support around the windows, so that resampling it equals
    resampling the whole image. Orientation tags are ignored, as in every published ImageNet result.
    """
    encoded, roi_start, roi_end, size, *region = sources
    options: dict[str, Any] = {
        "device": "mixed" if gpu else "cpu",
        "output_type": types.RGB,
        "adjust_orientation": False,
        "jpeg_fancy_upsampling": True,  # nvJPEG's default repeats chroma instead of interpolating it as libjpeg-turbo does
    }
    if slices:
        pixels = fn.decoders.image_slice(encoded, start=region[0], end=region[1], axes=[0, 1], **options)
    else:
        pixels = fn.decoders.image(encoded, hw_decoder_load=hw_decoder_load, **options)
    pictures = [fn.resize(pixels, size=size, roi_start=roi_start[c], roi_end=roi_end[c], dtype=types.UINT8) for c in range(crops)]
    return pictures[0] if crops == 1 else fn.stack(*pictures)


def build_pipeline(source: Any, batch_size: int, spec: LoaderSpec, slices: bool) -> Pipeline:
    """The pipeline around `graph`, fed by calling `source()`; on a GPU, `build()` is what first needs one."""
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
        )
        pipe.set_outputs(graph(sources, spec.geometry.crops, gpu, slices, spec.hw_decoder_load))
    return pipe


class DaliLoader(Loader):
    """Feeds one DALI pipeline with the plan. The pipeline runs on across epochs, so that an epoch's end costs nothing."""

    engine = "dali"

    def __init__(self, spec: LoaderSpec) -> None:
        super().__init__(spec)
        gpu = torch.device(spec.device).type == "cuda"
        self._cuts = self.shards.manifest.profile in CUT_PROFILES
        # A GPU's hardware decoder takes whole streams only; on the CPU the rest of a cut need not be decoded in full.
        self._slices = not (gpu and self._cuts)
        self._pipe: Pipeline | None = None
        self._schedule: Iterator[BatchRange] = iter(())
        self._in_flight: deque[BatchPlan] = deque()
        self._by_host: set[BatchRange] = set()  # parts that DALI failed on
        self._threads: ThreadPoolExecutor | None = None

    def close(self) -> None:
        super().close()
        self._drop_pipeline()
        if self._threads:
            self._threads.shutdown()
            self._threads = None

    def _make(self, batch_range: BatchRange) -> Batch:
        pictures = self._run(batch_range)
        plan = self._in_flight.popleft()
        check_turn(plan, batch_range)
        # from_dlpack tells DALI torch's current stream, and DALI makes that stream wait for its own; the memory is bound to it.
        pixels = torch.from_dlpack(pictures.as_tensor())
        return self.finish(pixels.reshape(-1, *plan.size, 3), plan)

    def _run(self, batch_range: BatchRange) -> Any:
        """DALI's next batch. Where it fails on corrupt samples, these are marked and the pipeline starts again at
        `batch_range`."""
        while True:
            pipe = self._pipe or self._start(batch_range)
            stream = torch.cuda.current_stream(self.spec.device) if pipe.device_id is not None else None
            try:
                return pipe.run(stream)[0]
            except RuntimeError:
                failed = list(self._in_flight)
                self._drop_pipeline()
                if not self._mark_corrupt_of(failed):
                    parts = {plan.batch_range for plan in failed}
                    if parts <= self._by_host:
                        raise
                    self._by_host = parts

    def _mark_corrupt_of(self, plans: list[BatchPlan]) -> bool:
        """Mark the samples that cannot be decoded; False if there are none."""
        found = False
        for plan in plans:
            pictures = np.empty((self.crops, *plan.size, 3), np.uint8)
            for place in range(len(plan.ids)):
                try:
                    self.make_views(Decoder(), plan, place, pictures)
                except CorruptImageError as error:
                    self.substitutes.mark(plan.batch_range.epoch, int(plan.ids[place]), str(error))
                    found = True
        return found

    def _start(self, batch_range: BatchRange) -> Pipeline:
        """A new pipeline whose first batch is `batch_range`."""
        self._schedule = self.upcoming(batch_range)
        largest = -(-self.spec.batch_size // self.spec.world_size)
        self._pipe = build_pipeline(self._source, largest, self.spec, self._slices)
        self._pipe.build()
        return self._pipe

    def _drop_pipeline(self) -> None:
        self._pipe = None
        self._in_flight.clear()

    def _source(self) -> tuple[Any, ...]:
        """What enters the graph for the next part: a list of byte arrays, then arrays of N rows."""
        plan = self.plan(next(self._schedule))
        feed = _Feed(self, plan)
        count = len(plan.ids)
        if self.spec.threads == 1:
            feed.encode(0, count)
        else:
            self._threads = self._threads or ThreadPoolExecutor(self.spec.threads, "cropfeed-cut")
            bounds = [count * i // self.spec.threads for i in range(self.spec.threads + 1)]
            list(self._threads.map(feed.encode, bounds[:-1], bounds[1:]))  # raises what a thread raised
        self._in_flight.append(plan)
        return feed.inputs()


class _Feed:
    """What DALI gets for one part: of each image a stream, and where its views' windows lie in that."""

    def __init__(self, loader: DaliLoader, plan: BatchPlan) -> None:
        count = len(plan.ids)
        self._loader, self._work = loader, plan
        self._encoded: list[Bytes] = [np.empty(0, np.uint8)] * count
        self._boxes = np.empty((count, 4), np.int64)  # top, left, height, width of what each stream shows of its image
        self._by_host = self._needs_host()

    def encode(self, first: int, last: int) -> None:
        """Make the streams of images [first, last). For any thread, each with images of its own."""
        for place in range(first, last):
            while True:
                try:
                    self._encoded[place] = self._encode(place)
                    break
                except CorruptImageError as error:
                    self._loader.replace(self._work, place, str(error))
                    self._by_host[place] = self._needs_host()[place]

    def _encode(self, place: int) -> Bytes:
        plan, box = self._work, self._boxes[place]
        data = self._loader.shards.read(int(plan.ids[place]))
        height, width = int(plan.heights[place]), int(plan.widths[place])
        views = self._views(place)
        if self._by_host[place]:
            pictures = np.empty((self._loader.crops, *plan.size, 3), np.uint8)
            self._loader.make_views(Decoder(), plan, place, pictures)
            box[:] = 0, 0, pictures.shape[0] * pictures.shape[1], pictures.shape[2]
            return to_ppm(pictures.reshape(-1, *pictures.shape[2:]))
        box[:] = 0, 0, height, width
        if self._loader._cuts:
            piece = np.empty(len(data), np.uint8)
            length = cut_windows(data, height, width, plan.views.windows[views], *plan.size, piece, box)
            if length > 0:
                return piece[:length]
            if length != _NO_TABLE and (reason := why_corrupt(data)):
                raise CorruptImageError(reason)
        return data

    def _needs_host(self) -> npt.NDArray[np.bool_]:
        """Which images the host makes: bool (N,)."""
        return at_border(self._work) | (self._work.batch_range in self._loader._by_host)

    def _views(self, place: int) -> slice:
        return slice(place * self._loader.crops, (place + 1) * self._loader.crops)

    def inputs(self) -> tuple[Any, ...]:
        """What enters the graph, once every stream is made."""
        plan, crops = self._work, self._loader.crops
        count, (rows, columns) = len(plan.ids), plan.size
        windows, flip = plan.views.windows.copy(), plan.views.flip.copy()
        heights, widths = plan.heights.copy(), plan.widths.copy()
        for place in np.flatnonzero(self._by_host).tolist():  # its pictures, finished, stand one below the other
            tops = np.arange(crops) * rows
            windows[self._views(place)] = np.stack([tops, 0 * tops, tops + rows, 0 * tops + columns], axis=1)
            flip[self._views(place)] = False
            heights[place], widths[place] = crops * rows, columns
        regions = sampling.regions(windows, heights.repeat(crops), widths.repeat(crops), plan.size).reshape(count, crops, 4)
        corner = self._boxes[:, :2]
        start, end = regions[:, :, :2].min(axis=1) - corner, regions[:, :, 2:].max(axis=1) - corner
        origin = (corner + start if self._loader._slices else corner).repeat(crops, axis=0)
        roi_start, roi_end = (windows[:, ends] - origin for ends in (slice(0, 2), slice(2, 4)))
        roi_start[flip, 1], roi_end[flip, 1] = roi_end[flip, 1], roi_start[flip, 1]
        rois = (roi.astype(np.float32).reshape(count, crops, 2) for roi in (roi_start, roi_end))
        size = np.tile(np.array(plan.size, np.float32), (count, 1))
        region = (start.astype(np.int32), end.astype(np.int32)) if self._loader._slices else ()
        return self._encoded, *rois, size, *region


def at_border(plan: BatchPlan) -> npt.NDArray[np.bool_]:
    """Which images have a view that is much reduced at the image's border: bool (N,)."""
    crops = len(plan.views.flip) // len(plan.ids)
    low, high = plan.views.windows[:, :2], plan.views.windows[:, 2:]
    scale = (high - low) / plan.size
    sides = np.stack([plan.heights, plan.widths], axis=1).repeat(crops, axis=0)
    reaches: npt.NDArray[np.bool_] = (scale > MOST_REDUCED) & ((low < scale) | (high > sides - scale))
    return np.asarray(reaches.reshape(len(plan.ids), -1).any(axis=1))


def to_ppm(pixels: npt.NDArray[np.uint8]) -> Bytes:
    """Pixels, uint8 (H, W, 3), as a binary PPM, uint8 (bytes,)."""
    header = f"P6\n{pixels.shape[1]} {pixels.shape[0]}\n255\n".encode()
    return np.concatenate([np.frombuffer(header, np.uint8), pixels.reshape(-1)])
