"""Stock FFCV on a .beton of JPEGs.

Settings follow FFCV's documentation and ffcv-imagenet: one worker per core, the file in the page cache (os_cache), random order,
flips and the decoder compiled by numba; NormalizeImage before ToTensor, so that it runs on the CPU. FFCV decodes whole images
and resamples them with OpenCV's area average, which is antialiased.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from ffcv.fields.basics import IntDecoder
from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder, ResizedCropRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, Squeeze, ToTensor

from tools.bench.peers.job import Job


def random_resized_crop(job: Job) -> Iterator[tuple[Any, Any]]:
    """ffcv-imagenet's own recipe. Its crops have another distribution: 8 to 100 % of the area, aspect 3/4 to 4/3."""
    return batches(job, RandomResizedCropRGBImageDecoder((job.size, job.size)))


def scale_jitter(job: Job) -> Iterator[tuple[Any, Any]]:
    """The crops of `Job`, rounded to whole source pixels."""
    return batches(job, ScaleJitterDecoder(job))


class ScaleJitterDecoder(ResizedCropRGBImageDecoder):
    """FFCV's random crop decoder with the draws of `Job`."""

    def __init__(self, job: Job) -> None:
        super().__init__((job.size, job.size))
        self.scale, self.ratio = job.scale, (job.size, job.size)  # the two arrays that FFCV passes to the crop generator

    @property
    def get_crop_generator(self) -> Callable[..., Any]:
        return jitter_crop


def jitter_crop(height: Any, width: Any, scale: Any, ratio: Any) -> Any:
    """Draw a crop: top, left, height, width in source pixels. FFCV compiles this function.

    scale: lowest and highest S. ratio: the crop's side, twice.
    """
    short = np.random.randint(scale[0], scale[1] + 1)
    zoom = min(height, width) / short
    resized_height, resized_width = int(height / zoom + 0.5), int(width / zoom + 0.5)
    top = (np.random.randint(0, resized_height - ratio[0] + 1) - resized_height / 2) * zoom + height / 2
    left = (np.random.randint(0, resized_width - ratio[0] + 1) - resized_width / 2) * zoom + width / 2
    first_row, first_column = max(int(top + 0.5), 0), max(int(left + 0.5), 0)
    last_row, last_column = min(int(top + ratio[0] * zoom + 0.5), height), min(int(left + ratio[0] * zoom + 0.5), width)
    return first_row, first_column, max(last_row - first_row, 1), max(last_column - first_column, 1)


def batches(job: Job, decoder: Any) -> Iterator[tuple[Any, Any]]:
    normalize = [NormalizeImage(np.array(job.mean), np.ones(3), np.float32)] if job.out == "float32" else []
    loader = Loader(
        job.beton(),
        batch_size=job.batch_size,
        num_workers=job.threads,
        os_cache=True,
        order=OrderOption.RANDOM,
        drop_last=True,
        pipelines={
            "image": [decoder, RandomHorizontalFlip(), *normalize, ToTensor()],
            "label": [IntDecoder(), ToTensor(), Squeeze()],
        },
    )
    while True:
        yield from loader
