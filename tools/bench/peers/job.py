"""`Job` describes the batches that every contender has to make. `draw` draws the crop of an image, for contenders in Python.
`make_loader` makes a contender a user's loader, for pipeline/profile.

This module imports only the standard library, because a contender may run in another Python without torch and our packages.
"""

from __future__ import annotations

import importlib
import json
import os
import random
from math import floor
from pathlib import Path
from typing import Any, NamedTuple

CONTENDER = "BENCH_CONTENDER"  # environment variable: a contender's function, module:name, and its Job, as JSON
LOADER = f"{__name__}:make_loader"


class Job(NamedTuple):
    """Endless batches of random crops.

    For each image: resize the short side to S, uniform on the integers scale[0]..scale[1]; crop size x size pixels at a uniform
    integer position; mirror left to right with probability 1/2.

    data: a folder with images/<class>/*.JPEG and, with the same images, shards/train/*.tar (WebDataset, each with DALI's index
    *.idx) and shards/train.beton. images: number of images. out: "uint8", or "float32" with `mean` (per channel, in 0..255)
    subtracted. Batches are (batch_size, size, size, 3) in memory; the last axis is RGB.
    """

    data: str
    images: int
    batch_size: int
    size: int
    scale: tuple[int, int]
    threads: int
    out: str
    mean: tuple[float, float, float]

    @staticmethod
    def of(values: list[Any]) -> Job:
        """A Job from JSON, which has no tuples."""
        fields: list[Any] = [tuple(value) if isinstance(value, list) else value for value in values]
        return Job(*fields)

    def tars(self) -> list[str]:
        return sorted(map(str, Path(self.data).glob("shards/train/*.tar")))

    def beton(self) -> str:
        return str(Path(self.data) / "shards" / "train.beton")

    def files(self) -> list[tuple[str, int]]:
        """Path and label of every image. A label is the index of the image's folder in sorted order."""
        folders = sorted(Path(self.data).glob("images/*"))
        return [(str(path), label) for label, folder in enumerate(folders) for path in sorted(folder.iterdir())]


class Window(NamedTuple):
    """The window of an image that a crop shows, in pixels of the image, and whether the crop is mirrored."""

    left: float
    top: float
    right: float
    bottom: float
    flip: bool

    def whole(self) -> tuple[int, int, int, int]:
        """left, top, right, bottom, rounded to whole pixels, for libraries that crop before they resize."""
        left, top = floor(self.left + 0.5), floor(self.top + 0.5)
        return left, top, max(left + 1, floor(self.right + 0.5)), max(top + 1, floor(self.bottom + 0.5))


def draw(height: int, width: int, job: Job) -> Window:
    """Draw a crop of an image of height x width pixels. Its window, resized to size x size, is a crop as `Job` describes."""
    side = min(height, width)
    short = random.randint(*job.scale)
    scale = side / short
    low, high = [], []
    for length in (width, height):
        resized = floor(length / scale + 0.5)
        start = (random.randint(0, resized - job.size) - resized / 2) * scale + length / 2  # the resized image is centred
        low.append(max(start, 0.0))
        high.append(min(start + job.size * scale, float(length)))
    return Window(low[0], low[1], high[0], high[1], random.random() < 0.5)


def make_loader() -> Any:
    function, job = json.loads(os.environ[CONTENDER])
    module, name = function.split(":")
    return getattr(importlib.import_module(module), name)(Job.of(job))
