"""Stock FFCV on a .beton of JPEGs, or of raw pixels, which need no decoding and several times the space.

Settings follow FFCV's documentation and ffcv-imagenet: one worker per core, the file in the page cache (os_cache), random order,
flips and the decoder compiled by numba; NormalizeImage before ToTensor, so that it runs on the CPU. FFCV decodes whole images
and resamples them with OpenCV's area average, which is antialiased.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ffcv.fields import IntField, RGBImageField
from ffcv.fields.basics import IntDecoder
from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder, ResizedCropRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, Squeeze, ToTensor
from ffcv.writer import DatasetWriter
from PIL import Image

from tools.bench.peers.jitter import jitter_crop
from tools.bench.peers.job import Job

PAGE = 1 << 23  # FFCV's default; an image cannot be larger than a page


def random_resized_crop(job: Job) -> Iterator[tuple[Any, Any]]:
    """ffcv-imagenet's own recipe. Its crops have another distribution: 8 to 100 % of the area, aspect 3/4 to 4/3."""
    return batches(job, job.beton(), RandomResizedCropRGBImageDecoder((job.size, job.size)))


def scale_jitter(job: Job) -> Iterator[tuple[Any, Any]]:
    """The crops of `Job`, rounded to whole source pixels."""
    return batches(job, job.beton(), ScaleJitterDecoder(job))


def raw(job: Job) -> Iterator[tuple[Any, Any]]:
    """The same crops of the same images, stored as pixels by FFCV's writer."""
    return batches(job, write_raw(job), ScaleJitterDecoder(job))


class ScaleJitterDecoder(ResizedCropRGBImageDecoder):
    """FFCV's random crop decoder with the draws of `Job`."""

    def __init__(self, job: Job) -> None:
        super().__init__((job.size, job.size))
        self.scale, self.ratio = job.scale, (job.size, job.size)  # the two arrays that FFCV passes to the crop generator

    @property
    def get_crop_generator(self) -> Callable[..., Any]:
        return jitter_crop


class Pixels:
    """The images, decoded, and their labels, for FFCV's writer."""

    def __init__(self, files: list[tuple[str, int]]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.files[index]
        return Image.open(path).convert("RGB"), label


def write_raw(job: Job) -> str:
    """Write a .beton of mode raw; returns its path. Raises ValueError if the disk has not twice the space."""
    files, beton = job.files(), Path(job.data) / "raw.beton"
    sides = [Image.open(path).size for path, _ in files]
    needed, free = sum(3 * width * height for width, height in sides), shutil.disk_usage(job.data).free
    if 2 * needed > free:
        raise ValueError(f"raw pixels take {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free in {beton.parent}: too few")
    page = max(PAGE, 1 << (3 * max(width * height for width, height in sides) - 1).bit_length())
    fields = {"image": RGBImageField(write_mode="raw"), "label": IntField()}
    DatasetWriter(str(beton), fields, page_size=page, num_workers=job.threads).from_indexed_dataset(Pixels(files))
    return str(beton)


def batches(job: Job, beton: str, decoder: Any) -> Iterator[tuple[Any, Any]]:
    normalize = [NormalizeImage(np.array(job.mean), np.ones(3), np.float32)] if job.out == "float32" else []
    loader = Loader(
        beton,
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
