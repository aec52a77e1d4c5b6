"""Cropfeed, opened with `pipeline.open_loader`, as users open it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline import open_loader
from pipeline.plan.geometry import ScaleJitter
from pipeline.spec import LoaderSpec
from tools.bench.peers.job import Job


def batches(job: Job, engine: str) -> Iterator[tuple[Any, Any]]:
    spec = LoaderSpec(
        Path(job.data) / "shards",
        batch_size=job.batch_size,
        image_size=job.size,
        geometry=ScaleJitter(*job.scale),
        normalization="channel",
        alpha_std=0.0,
        dtype=getattr(torch, job.out),
        engine=engine,
        threads=job.threads,
    )
    loader = open_loader(spec)
    while True:
        for batch in loader:
            yield batch.images.permute(0, 2, 3, 1), batch.labels  # channels-last: a view


cpu, dali, ffcv = (partial(batches, engine=engine) for engine in ("cpu", "dali", "ffcv"))
