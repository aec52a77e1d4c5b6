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
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from nvidia.dali import Pipeline, fn, types

from ..batch import Batch, BatchPlan, BatchRange, check_in_order
from ..loader import Loader
from ..pixels.decoder import CorruptImageError, Decoder
from ..spec import LoaderSpec
from .dali_input import INPUTS, SLICE_INPUT, Input

CUT_PROFILES = ("lossless", "compact")  # profiles of the manifest with region-addressable images
MAX_RESTARTS = 3  # for failures without a corrupt sample, unless `CALM` batches lie between two of them
CALM = 1000
log = logging.getLogger("cropfeed")


def open(spec: LoaderSpec) -> DaliLoader:
    """A loader of `spec`. Raises UserError for a bad spec or a device that does not exist."""
    return DaliLoader(spec)


def graph(
    sources: Any, crops: Sequence[int], gpu: bool, slices: bool, hw_decoder_load: float, bicubic: bool = False
) -> list[Any]:
    """Define the graph. sources: its inputs, `INPUTS` and, with slices, `SLICE_INPUT`. crops: views of each size. Returns an
    output for each size: uint8 (height, width, 3) for one view, else (crops, height, width, 3).

    slices: decode only the region; windows are then relative to its start.
    The decoded region includes the support of the resampling filter around the windows, in whole pixels, so that resampling it
    equals resampling the whole image. Orientation tags are ignored, as in every published ImageNet result.
    """
    encoded, windows, *region = sources
    options: dict[str, Any] = {
        "device": "mixed" if gpu else "cpu",
        "output_type": types.RGB,
        "adjust_orientation": False,
        "jpeg_fancy_upsampling": True,  # nvJPEG's default repeats chroma instead of interpolating it as libjpeg-turbo does
        "hw_decoder_load": hw_decoder_load,
        "affine": False,  # DALI would pin its threads to cores by NVML, which fails in virtual machines
    }
    if slices:
        pixels = fn.decoders.image_slice(encoded, start=region[0][0], end=region[0][1], axes=[0, 1], **options)
    else:
        pixels = fn.decoders.image(encoded, **options)
    views = [pixels] * sum(crops)
    for view in range(len(views)):
        for i in range(2 if bicubic else 1):
            views[view] = fn.resize(
                views[view],
                roi_start=windows[view, i, 0],
                roi_end=windows[view, i, 1],
                size=windows[view, i, 2],
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
    dtypes, dimensions = zip(*INPUTS, *[SLICE_INPUT] * slices, strict=True)
    with pipe:
        sources = fn.external_source(
            source,
            num_outputs=len(dtypes),
            dtype=list(dtypes),
            ndim=list(dimensions),
            no_copy=True,  # `Input` keeps the memory
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
        self._input: Input | None = None

    def close(self) -> None:
        self._stop()
        super().close()  # last, as the input's thread can begin to prefetch a block of shards

    def _make_batch(self, batch_range: BatchRange) -> Batch:
        outputs = self._run(batch_range)
        assert self._input
        plan = self._input.in_flight.popleft()
        check_in_order(plan, batch_range)
        # from_dlpack passes torch's current stream to DALI, which makes that stream wait for its own.
        pixels = [torch.from_dlpack(views.as_tensor()) for views in outputs]
        batch = self.finish([its.reshape(shape) for its, shape in zip(pixels, plan.shapes, strict=True)], plan)
        self._input.prepare()  # last: both threads need the interpreter's lock, and each of DALI's calls above waits for it anew
        return batch

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
                assert self._input
                failed = list(self._input.in_flight)
                self._stop()
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
        self._input = Input(self, batch_range)
        self._pipe = build_pipeline(self._input, largest, self.spec, self.slices)
        self._pipe.build()
        return self._pipe

    def _stop(self) -> None:
        """Drop the pipeline and end the threads of its input."""
        its_input, self._pipe, self._input = self._input, None, None
        if its_input:
            its_input.close()


def _in_one_line(error: RuntimeError) -> str:
    """DALI's error without the places in its code and in ours."""
    text = " ".join(str(error).partition("Stacktrace")[0].split())
    return re.sub(r", which was used in the pipeline definition .*? encountered", "", text)
