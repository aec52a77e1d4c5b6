"""SPDL: FFmpeg's decoder and filters in threads.

Settings follow SPDL's documentation and its image_dataloading example: paths are aggregated to batches, a stage decodes whole
batches with one thread per core (as `load_image_batch` does, but with a filter for each image), FFmpeg's own threads are off, and
the sink prefetches batches. FFmpeg crops before it scales; swscale's bilinear filter is antialiased.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import spdl.io
from spdl.pipeline import PipelineBuilder

from tools.bench.peers.job import Job, draw

SINK = 2  # batches in the sink


def threads(job: Job) -> Iterator[tuple[Any, Any]]:
    pipeline = (
        PipelineBuilder()
        .add_source(endless(job.files()))
        .aggregate(job.batch_size)
        .pipe(partial(load_batch, job=job), concurrency=job.threads)
        .add_sink(SINK)
        .build(num_threads=job.threads)
    )
    with pipeline.auto_stop():
        yield from pipeline.get_iterator()


def endless(files: list[tuple[str, int]]) -> Iterator[tuple[str, int]]:
    while True:
        yield from random.sample(files, len(files))


def load_batch(samples: list[tuple[str, int]], job: Job) -> tuple[Any, Any]:
    frames = [decode(path, job) for path, _ in samples]
    images = spdl.io.to_numpy(spdl.io.convert_frames(frames))
    if job.out == "float32":
        images = images.astype(np.float32) - np.array(job.mean, np.float32)
    return images, np.array([label for _, label in samples])


def decode(path: str, job: Job) -> Any:
    packets = spdl.io.demux_image(path)
    window = draw(packets.height, packets.width, job)
    left, top, right, bottom = window.whole()
    crop = f"crop={right - left}:{bottom - top}:{left}:{top}:exact=1"
    flip = ",hflip" if window.flip else ""
    filters = f"{crop},scale={job.size}:{job.size}:flags=bilinear{flip},format=rgb24"
    return spdl.io.decode_packets(packets, filter_desc=filters, decode_config=one_thread())


def one_thread() -> Any:
    return spdl.io.decode_config(decoder_options={"threads": "1"})
