"""slipstream (github.com/harvard-visionlab/slipstream): a cache of JPEGs or of YUV 4:2:0 pixels, and numba threads.

Settings follow its README and docs/ADVANCED.md: an image folder, whose cache is built once, SlipstreamLoader with its prefetching
thread, DecodeRandomResizedCrop with one thread per core, and its RandomHorizontalFlip. It decodes whole images and resamples
them with stb_image_resize2, which is antialiased. Its decoder draws the crops of `Job`, rounded to whole source pixels.

It is not on PyPI. Who compares it builds it, preferably for the machine's own processor, and names its Python with --python-for.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numba
import numpy as np
from slipstream import DecodeRandomResizedCrop, SlipstreamImageFolder, SlipstreamLoader
from slipstream.decoders import numba_decoder, yuv420_decoder
from slipstream.transforms import RandomHorizontalFlip

from tools.bench.peers.jitter import jitter_crop
from tools.bench.peers.job import Job
from tools.bench.peers.torch_loaders import normalized


class Images(SlipstreamImageFolder):
    """slipstream would store its own hash among the images, where other contenders read."""

    dataset_hash = "images"


def batches(job: Job, image_format: str) -> Iterator[tuple[Any, Any]]:
    for module in (numba_decoder, yuv420_decoder):
        module._generate_random_crop_params_batch = crops_of(job)
    folder = Path(job.data)
    decode = DecodeRandomResizedCrop(job.size, num_threads=job.threads, to_tensor=True)
    loader = SlipstreamLoader(
        Images(folder / "images", cache_dir=folder / f"slipstream-{image_format}"),
        batch_size=job.batch_size,
        image_format=image_format,
        exclude_fields=["index", "path"],
        pipelines={"image": [decode, channels_first, RandomHorizontalFlip(), channels_last]},
        verbose=False,
    )
    return normalized(pairs(loader), job)


def crops_of(job: Job) -> Any:
    """A function with the arguments of slipstream's that draws the crops of `Job`: x, y, width, height, int32 (N, 4)."""
    draw, scale, ratio = numba.njit(jitter_crop), job.scale, (job.size, job.size)

    @numba.njit
    def crops(widths: Any, heights: Any, low: Any, high: Any, log_low: Any, log_high: Any, seed: Any) -> Any:
        found = np.empty((len(widths), 4), np.int32)
        for i in range(len(widths)):
            top, left, height, width = draw(heights[i], widths[i], scale, ratio)
            found[i, 0], found[i, 1], found[i, 2], found[i, 3] = left, top, width, height
        return found

    return crops


def channels_first(images: Any) -> Any:
    return images.permute(0, 3, 1, 2)  # a view


def channels_last(images: Any) -> Any:
    return images.permute(0, 2, 3, 1)


def pairs(loader: Any) -> Iterator[tuple[Any, Any]]:
    while True:
        for batch in loader:
            yield batch["image"], batch["label"]


jpeg, yuv420 = (partial(batches, image_format=image_format) for image_format in ("jpeg", "yuv420"))
