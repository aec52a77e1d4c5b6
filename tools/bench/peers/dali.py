"""NVIDIA DALI on the CPU: four graphs behind the same WebDataset reader.

Settings follow DALI's documentation: the WebDataset example (fn.readers.webdataset with the index files of wds2idx,
fn.decoders.image, fn.resize, fn.crop_mirror_normalize), one thread per core, prefetching of two batches, and the decoder's
use_fast_idct, which trades a little quality for speed, as FFCV's decoder does. DALI's decoders are those of nvImageCodec, and
fn.experimental.decoders are the same. `Pipeline.run` with zero-copy arrays is at least as fast as DALI's PyTorch iterator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import nvidia.dali.math as dmath
from nvidia.dali import fn, pipeline_def, types

from tools.bench.peers.job import Job

AHEAD = 2  # batches that DALI prefetches
Graph = Callable[[Any, Job], Any]  # from encoded images to crops


def batches(job: Job, graph: Graph) -> Iterator[tuple[Any, Any]]:
    pipe = pipeline(job, graph)
    pipe.build()
    while True:
        images, labels = pipe.run()
        yield np.from_dlpack(images.as_tensor()), np.from_dlpack(labels.as_tensor())  # labels: the digits in our .cls files


def pipeline(job: Job, graph: Graph) -> Any:
    tars = job.tars()

    @pipeline_def(batch_size=job.batch_size, num_threads=job.threads, device_id=None, prefetch_queue_depth=AHEAD, seed=1)
    def definition() -> tuple[Any, Any]:
        outputs: Any = fn.readers.webdataset(
            paths=tars,
            index_paths=[tar.removesuffix(".tar") + ".idx" for tar in tars],
            ext=["jpg", "cls"],
            missing_component_behavior="error",
            random_shuffle=True,
        )
        encoded, labels = outputs
        return graph(encoded, job), labels

    return definition()


DECODER = {"device": "cpu", "output_type": types.RGB, "use_fast_idct": True, "adjust_orientation": False}
decode = partial(fn.decoders.image, **DECODER)


def short_side(job: Job) -> Any:
    """S, as the floor of a uniform float, because DALI draws no integers from a range."""
    low, high = job.scale
    return dmath.floor(fn.random.uniform(range=[float(low), float(high + 1)]))


def decode_resize_crop(encoded: Any, job: Job) -> Any:
    """Decode, resize, then crop, as in the documentation. fn.crop_mirror_normalize also mirrors and subtracts the mean."""
    resized = fn.resize(decode(encoded), resize_shorter=short_side(job))
    floats = job.out == "float32"
    return fn.crop_mirror_normalize(
        resized,
        crop=(job.size, job.size),
        crop_pos_x=fn.random.uniform(range=[0.0, 1.0]),
        crop_pos_y=fn.random.uniform(range=[0.0, 1.0]),
        mirror=fn.random.coin_flip(),
        mean=list(job.mean) if floats else [0.0],
        dtype=types.FLOAT if floats else types.UINT8,
        output_layout="HWC",
    )


def decode_fused(encoded: Any, job: Job) -> Any:
    """Decode, then fn.resize_crop_mirror, which resamples only the crop."""
    images = fn.resize_crop_mirror(
        decode(encoded),
        resize_shorter=short_side(job),
        crop=(job.size, job.size),
        crop_pos_x=fn.random.uniform(range=[0.0, 1.0]),
        crop_pos_y=fn.random.uniform(range=[0.0, 1.0]),
        mirror=fn.random.coin_flip(),
    )
    return normalized(images, job)


def decode_roi(encoded: Any, job: Job) -> Any:
    """fn.peek_image_shape and fn.decoders.image_slice: decode only the crop, then resample it at sub-pixel positions.

    It is decoded with a margin for the resampling filter, so that the result is the same. Each node holds two numbers, for height
    and width. Mirroring costs nothing: it swaps the window's left and right ends.
    """
    size = float(job.size)
    sides = fn.cast(fn.peek_image_shape(encoded, adjust_orientation=False)[0:2], dtype=types.FLOAT)
    short = dmath.min(sides[0], sides[1])
    target = short_side(job)
    scale = short / target
    resized = dmath.floor(sides * (target / short) + 0.5)
    position = fn.random.uniform(range=[0.0, 1.0], shape=(2,))
    corner = dmath.min(dmath.floor(position * (resized - (size - 1.0))), resized - size)
    low = (corner - resized * 0.5) * scale + sides * 0.5
    high = low + size * scale
    margin = dmath.max(scale, 1.0) + 1.0
    start, end = dmath.max(dmath.floor(low - margin), 0.0), dmath.min(dmath.ceil(high + margin), sides)
    region = fn.decoders.image_slice(
        encoded,
        start=fn.cast(start, dtype=types.INT32),
        end=fn.cast(end, dtype=types.INT32),
        axes=[0, 1],
        **DECODER,
    )
    low, high, flip = low - start, high - start, fn.cast(fn.random.coin_flip(), dtype=types.FLOAT)
    images = fn.resize(
        region,
        size=(job.size, job.size),
        roi_start=fn.stack(low[0], low[1] * (1.0 - flip) + high[1] * flip),
        roi_end=fn.stack(high[0], high[1] * (1.0 - flip) + low[1] * flip),
    )
    return normalized(images, job)


def decode_random_crop(encoded: Any, job: Job) -> Any:
    """DALI's own ImageNet recipe, fn.decoders.image_random_crop. Its crops have another distribution, as `ffcv-rrc` has."""
    region = fn.decoders.image_random_crop(encoded, random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3], **DECODER)
    return normalized(fn.flip(fn.resize(region, size=(job.size, job.size)), horizontal=fn.random.coin_flip()), job)


def normalized(images: Any, job: Job) -> Any:
    if job.out == "uint8":
        return images
    return fn.crop_mirror_normalize(images, mean=list(job.mean), dtype=types.FLOAT, output_layout="HWC")


plain = partial(batches, graph=decode_resize_crop)
resize_crop_mirror = partial(batches, graph=decode_fused)
roi = partial(batches, graph=decode_roi)
random_resized_crop = partial(batches, graph=decode_random_crop)
