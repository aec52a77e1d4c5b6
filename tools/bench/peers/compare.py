"""A fair comparison of input pipelines on the CPU: who else makes the same crops from the same images, and how fast.

Every contender runs in a process of its own, all on the same cores, one at a time while the others idle. Each is warmed up by an
epoch; then, in every repeat, each has its turn of some seconds, in an order drawn anew by a fixed seed. What it made before its
turn does not count. Ratios are taken within a repeat, against the peer on the same data whose median is highest: ours that read
shards of the original files against peers on the original files, `compact` against peers on the 500 pixel files.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.store.shards import ShardSet
from tools.bench.peers import cuts, data, report
from tools.bench.peers.contenders import CONTENDERS, Contender
from tools.bench.peers.job import Job
from tools.bench.peers.turns import measure


@dataclass(frozen=True)
class Options:
    """images: folder or tar. repeats, seconds: of each contender's turns. only: names, or name:data; empty for all. out: uint8 or
    float32. size, scale: the crop's side and the range of S, pixels. threads: cores, and each contender's threads or workers.
    pythons: name -> the Python that runs it, where that is not this one. results: the file for rows."""

    images: Path
    results: Path
    repeats: int
    seconds: float
    batch_size: int
    only: tuple[str, ...]
    out: str
    size: int
    scale: tuple[int, int]
    threads: int
    pythons: dict[str, str]


def compare(options: Options) -> dict[str, Any]:
    """Prepare, measure, write the rows, print the table. Returns what a JSON file is to hold, see `tools.bench.peers.report`."""
    chosen = choose(options.only)
    check(options)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])  # inherited by every contender
    with tempfile.TemporaryDirectory(prefix="cropfeed-compare-") as name:
        folder = Path(name)
        kinds = {contender.data for contender in chosen}
        impossible = data.prepare(options.images, folder, kinds, {c.data for c in chosen if c.reads_beton})
        errors = {c.key: impossible[c.data] for c in chosen if c.reads_beton and c.data in impossible}
        jobs = {kind: job(folder / kind, options) for kind in kinds}
        results = measure(chosen, jobs, options.repeats, options.seconds, options.pythons, errors)
        touched = cuts.touched(jobs["lossless"]) if "lossless" in jobs else None  # at last, when nobody maps the shards
    figures = report.figures(results)
    spec = describe(options, next(iter(jobs.values())).images)
    report.write_csv(options.results, figures, touched, spec)
    print(report.table(figures, touched))
    return report.content(figures, touched, spec)


def choose(only: Sequence[str]) -> list[Contender]:
    """The contenders that `only` names, or all."""
    known = {name for contender in CONTENDERS for name in (contender.name, contender.key)}
    for name in only:
        if name not in known:
            names = ", ".join(dict.fromkeys(contender.name for contender in CONTENDERS))
            raise UserError(f"--only {name}: no such contender; choose from {names}; NAME:500 is one on one kind of data")
    return [contender for contender in CONTENDERS if not only or contender.name in only or contender.key in only]


def check(options: Options) -> None:
    """Raise UserError before minutes are spent on what cannot end well."""
    low, high = options.scale
    if not 1 <= options.size <= low <= high:
        raise UserError(f"--scale {low} {high}: needs --image-size ({options.size}) <= low <= high")
    names = {contender.name for contender in CONTENDERS}
    for name in options.pythons:
        if name not in names:
            raise UserError(f"--python-for {name}=...: no such contender; see --only")
    if len(os.sched_getaffinity(0)) < options.threads:
        raise UserError(f"--threads {options.threads}: this process may use {len(os.sched_getaffinity(0))} cores only")


def job(folder: Path, options: Options) -> Job:
    """What contenders on this data must do."""
    shards = ShardSet(folder / "shards", "train")
    if len(shards) < options.batch_size:
        raise UserError(f"{options.images}: {len(shards)} usable images, fewer than --batch-size {options.batch_size}")
    red, green, blue = shards.manifest.channel_mean().tolist()
    geometry = options.batch_size, options.size, options.scale
    return Job(str(folder), len(shards), *geometry, options.threads, options.out, (red, green, blue))


def describe(options: Options, images: int) -> str:
    low, high = options.scale
    geometry = f"{options.size} crop, S {low}..{high}, flip, batch {options.batch_size}, {options.out}"
    return f"{options.images.name}, {images} images, {geometry}, {options.threads} cores, {options.seconds:g} s a repeat"
