"""The DALI engine: one graph for CPU and GPU.

Encoded bytes and draws enter through `external_source`, from mapped shards; DALI decodes the crop's region (`mixed` on a
GPU), resamples the window, mirrors by swapping its left and right ends, applies the colour tail and hands over NHWC memory,
which torch sees as channels-last NCHW without a copy.

DALI has no bfloat16: 16-bit batches leave it as float16 (finer than bfloat16 over 0..255) and are converted on the device.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types
from PIL import Image

from pipeline import plan
from pipeline.augment import Normalization, lighting
from pipeline.errors import UserError
from pipeline.loader import Batch, Loader, LoaderSpec, Part, Work

# External inputs, in the order that `inputs` makes them: name, DALI type, dimensions of one sample.
INPUTS = (
    ("encoded", types.UINT8, 1),
    ("region_start", types.INT32, 1),
    ("region_end", types.INT32, 1),
    ("roi_start", types.FLOAT, 1),
    ("roi_end", types.FLOAT, 1),
    ("shift", types.FLOAT, 1),
    ("label", types.INT64, 0),
)


def open(spec: LoaderSpec) -> DaliLoader:
    """A loader of `spec`. Raises UserError for a bad spec or a device that is not there."""
    return DaliLoader(spec)


def graph(sources: Any, size: int, normalization: Normalization, half: bool, gpu: bool) -> tuple[Any, Any]:
    """The graph's nodes from its inputs (in `INPUTS` order): images (size, size, 3) float32 or float16, and labels.

    The decoded region ends on whole pixels with the resampling filter's support around the window, so that resampling it
    equals resampling the whole image. Orientation tags are ignored, as in every published ImageNet result.

    One difference from Pillow remains: where the filter reaches beyond the image, DALI repeats the image's last pixel and Pillow
    leaves it out. A picture's outermost pixels then differ by up to 1/8 of the step from their mean to the image's last pixel.
    It takes an original reduced about tenfold and hard edges along its border for that to exceed 4 of 255.
    """
    encoded, region_start, region_end, roi_start, roi_end, shift, label = sources
    pixels = fn.decoders.image_slice(
        encoded,
        device="mixed" if gpu else "cpu",
        start=region_start,
        end=region_end,
        axes=[0, 1],
        output_type=types.RGB,
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,  # nvJPEG's default repeats chroma instead of interpolating it as libjpeg-turbo does
    )
    crop = fn.resize(pixels, size=(size, size), roi_start=roi_start, roi_end=roi_end)
    device = "gpu" if gpu else "cpu"
    if gpu:
        shift, label = shift.gpu(), label.gpu()
    images = crop + shift - types.Constant(normalization.mean, device=device)
    if np.any(normalization.std != 1):
        images = images * types.Constant(1 / normalization.std, device=device)
    return fn.cast(images, dtype=types.FLOAT16 if half else types.FLOAT), label


def inputs(loader: Loader, work: Work) -> tuple[Any, ...]:
    """What enters the graph for one batch, in `INPUTS` order: a list of byte views, then arrays of N rows."""
    region = plan.regions(work.windows, work.heights, work.widths, loader.spec.image_size).astype(np.int32)
    region_start, region_end = region[:, :2].copy(), region[:, 2:].copy()
    roi_start = (work.windows[:, :2] - region_start).astype(np.float32)
    roi_end = (work.windows[:, 2:] - region_start).astype(np.float32)
    flip = work.draws.flip
    roi_start[flip, 1], roi_end[flip, 1] = roi_end[flip, 1], roi_start[flip, 1]
    return (
        [loader.shards.read(int(index)) for index in work.ids],
        region_start,
        region_end,
        roi_start,
        roi_end,
        lighting(work.draws, loader.basis),
        loader.shards.samples["label"][work.ids].astype(np.int64),
    )


def build_pipeline(source: Any, batch_size: int, spec: LoaderSpec, normalization: Normalization) -> Pipeline:
    """The pipeline around `graph`, fed by calling `source()`; on a GPU, `build()` is what first needs one."""
    gpu = torch.device(spec.device).type == "cuda"
    device_id = (torch.device(spec.device).index or 0) if gpu else None
    pipe = Pipeline(batch_size, spec.threads, device_id, prefetch_queue_depth=spec.prefetch)
    with pipe:
        sources = fn.external_source(
            source,
            num_outputs=len(INPUTS),
            dtype=[dtype for _, dtype, _ in INPUTS],
            ndim=[dimensions for _, _, dimensions in INPUTS],
        )
        pipe.set_outputs(*graph(sources, spec.image_size, normalization, spec.dtype != torch.float32, gpu))
    return pipe


class DaliLoader(Loader):
    """Feeds one DALI pipeline with the plan. The pipeline runs on across epochs, so that an epoch's end costs nothing."""

    engine = "dali"

    def __init__(self, spec: LoaderSpec) -> None:
        super().__init__(spec)
        if torch.device(spec.device).type == "cuda" and not torch.cuda.is_available():
            raise UserError(f"device {spec.device}: torch sees no CUDA GPU; use device cpu, or check the driver")
        self._pipe: Pipeline | None = None
        self._schedule: Iterator[Part] = iter(())
        self._in_flight: deque[Work] = deque()

    def close(self) -> None:
        self._pipe = None
        self._in_flight.clear()

    def _make(self, part: Part) -> Batch:
        pipe = self._pipe or self._start(part)
        try:
            images, labels = pipe.run()
        except RuntimeError as error:
            in_flight = list(self._in_flight)
            self.close()
            raise self._explain(error, in_flight) from error
        except BaseException:
            self.close()
            raise
        work = self._in_flight.popleft()
        if work.part != part:
            raise RuntimeError("two iterations over one loader at a time; open a loader for each")
        tensor = torch.from_dlpack(images.as_tensor()).permute(0, 3, 1, 2)
        return Batch(tensor.to(self.spec.dtype), torch.from_dlpack(labels.as_tensor()), work.ids)

    def seek(self, epoch: int, consumed: int) -> None:
        super().seek(epoch, consumed)
        self.close()  # what is in flight belongs to the old place

    def _start(self, part: Part) -> Pipeline:
        """A new pipeline whose first batch is `part`."""
        self._schedule = self._endless(part)
        largest = -(-self.spec.batch_size // self.spec.world_size)
        self._pipe = build_pipeline(self._source, largest, self.spec, self.normalization)
        self._pipe.build()
        return self._pipe

    def _endless(self, part: Part) -> Iterator[Part]:
        yield part
        epoch, start = part.epoch, part.stop
        while True:
            yield from self.parts(epoch, start)
            epoch, start = epoch + 1, 0

    def _source(self) -> tuple[Any, ...]:
        work = self.plan(next(self._schedule))
        self._in_flight.append(work)
        return inputs(self, work)

    def _explain(self, error: RuntimeError, in_flight: list[Work]) -> Exception:
        """DALI fails a whole batch without saying where: name the sample that Pillow cannot decode either."""
        for index in (int(index) for work in in_flight for index in work.ids):
            try:
                Image.open(io.BytesIO(self.shards.read(index).tobytes())).load()
            except Exception as cause:  # whatever a decoder raises, this is the sample
                return UserError(f"{self.shards.where(index)}: cannot be decoded ({cause}); make the shards again")
        return error
