"""A fair comparison of input pipelines on the CPU: the throughput of pipelines that make the same crops from the same images.

Each contender runs in its own process. All use the same cores, one at a time, while the others idle. Each is warmed up for an
epoch. In every repeat, each contender is measured for some seconds, in a new order drawn from a fixed seed. Batches that it
prefetched before do not count. Ratios are taken within a repeat, to the peer on the same data with the highest median: Cropfeed
on shards of the original files to peers on the original files, and Cropfeed on `compact` shards to peers on the 500 pixel files.
Peers that store pixels instead of JPEGs are judged by images/s and bytes on disk; ratios are to them only if no other is there.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import UserError
from pipeline.plan import sampling
from pipeline.store.shards import ShardSet
from tools.bench.peers import cuts, data, report
from tools.bench.peers.contenders import CONTENDERS, Contender
from tools.bench.peers.job import Job
from tools.bench.peers.turns import measure
from tools.bench.recording import RESULTS

OUT = ("uint8", "float32")
ROWS = RESULTS / "compare.csv"
ONE_CORE = "not measured: FFCV can hang with one core, in numba's TBB threads"


@dataclass(frozen=True)
class CompareOptions:
    """images: a folder of class folders of JPEGs, a tar of one, or a folder of shards. results: the CSV file for the rows.

    repeats, seconds: number and duration of each contender's measurements. only: contenders, by name or name:data; empty for all.
    out: the dtype of batches, one of OUT. image_size, scale: the crop's side and the range of the resized short side, pixels.
    threads: number of cores, and of threads or workers of each contender. python_for: contender's name -> the Python that runs
    it; by default the one that runs this script. Raises UserError for values outside their ranges.
    """

    images: Path
    results: Path = ROWS
    repeats: int = 5
    seconds: float = 3.0
    batch_size: int = 64
    only: tuple[str, ...] = ()
    out: str = "uint8"
    image_size: int = sampling.CROP
    scale: tuple[int, int] = sampling.SCALE
    threads: int = 2
    python_for: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = {contender.name for contender in CONTENDERS}
        for name in self.only:
            if name not in names | {contender.key for contender in CONTENDERS}:
                known = ", ".join(dict.fromkeys(contender.name for contender in CONTENDERS))
                raise UserError(f"`only` {name}: no such contender", f"choose from {known}; NAME:500 for one kind of data")
        for name in self.python_for:
            if name not in names:
                raise UserError(f"`python_for` {name}=...: no such contender", f"choose from {', '.join(sorted(names))}")
        if self.out not in OUT:
            raise UserError(f"`out` is {' or '.join(OUT)}, not {self.out!r}")
        low, high = self.scale
        if not 1 <= self.image_size <= low <= high:
            raise UserError(f"`scale` {low} {high}: needs `image_size` ({self.image_size}) <= low <= high")
        if self.repeats < 2:
            raise UserError(f"`repeats` must be at least 2, not {self.repeats}: one repeat shows no spread")
        if not (0 < self.seconds < float("inf") and self.batch_size > 0):
            raise UserError("`seconds` and `batch_size` must be above 0")
        usable = len(os.sched_getaffinity(0))
        if not 1 <= self.threads <= usable:
            raise UserError(f"`threads` {self.threads}: this process may use {usable} cores")

    @property
    def contenders(self) -> list[Contender]:
        """The contenders that `only` names, or all."""
        return [one for one in CONTENDERS if not self.only or one.name in self.only or one.key in self.only]


def compare(options: CompareOptions) -> None:
    """Prepare the data, measure, write the rows and print the table."""
    contenders = options.contenders
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])  # all contenders inherit this
    with tempfile.TemporaryDirectory(prefix="cropfeed-compare-") as name:
        folder = Path(name)
        kinds = {contender.data for contender in contenders}
        without_beton = data.prepare(options.images, folder, kinds, {one.data for one in contenders if one.reads_beton})
        errors = {one.key: without_beton[one.data] for one in contenders if one.reads_beton and one.data in without_beton}
        if options.threads == 1:
            errors |= {one.key: ONE_CORE for one in contenders if one.function.startswith("tools.bench.peers.ffcv:")}
        jobs = {kind: job(folder / kind, options) for kind in kinds}
        results = measure(contenders, jobs, options.repeats, options.seconds, options.python_for, errors)
        touched = cuts.touched(jobs["lossless"]) if "lossless" in jobs else None  # at the end, when no process maps the shards
    figures = report.figures(results)
    report.write_csv(options.results, figures, touched, describe(options, next(iter(jobs.values())).images))
    print(report.table(figures, touched))


def job(folder: Path, options: CompareOptions) -> Job:
    """The contenders' job on this data."""
    shards = ShardSet(folder / "shards", "train")
    if len(shards) < options.batch_size:
        raise UserError(f"{options.images}: {len(shards)} usable images, fewer than `batch_size` {options.batch_size}")
    red, green, blue = shards.manifest.channel_mean().tolist()
    geometry = options.batch_size, options.image_size, options.scale
    return Job(str(folder), len(shards), *geometry, options.threads, options.out, (red, green, blue))


def describe(options: CompareOptions, images: int) -> str:
    low, high = options.scale
    geometry = f"{options.image_size} crop, S {low}..{high}, flip, batch {options.batch_size}, {options.out}"
    return f"{options.images.name}, {images} images, {geometry}, {options.threads} cores, {options.seconds:g} s a repeat"
