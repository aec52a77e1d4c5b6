"""For bench_accuracy.py: the validation curves of finished runs, and the figures computed from them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from pipeline.errors import UserError
from tools.bench.recording import Figure
from training.metrics import read_metrics


class Run(NamedTuple):
    """A finished run. curve: epochs done, minutes since training began (validations included) and top-1 in percent, for each
    validation. minutes: time of training and validation. wall_minutes: time of its process, including start-up."""

    curve: list[tuple[float, float, float]]
    minutes: float
    wall_minutes: float

    def reach(self, level: float) -> tuple[float, float]:
        """Epochs and minutes until top-1 first reaches `level` percent; both infinite if it never does."""
        return next(((epoch, minutes) for epoch, minutes, top1 in self.curve if top1 >= level), (math.inf, math.inf))


def read_run(folder: Path) -> Run:
    """The run that bench_accuracy.py left in `folder`. Raises UserError for a run without validations."""
    metrics = folder / "run" / "metrics.csv"
    rows = read_metrics(metrics)
    curve = [(float(row["epoch"]), float(row["seconds"]) / 60, 100 * float(row["val_top1"])) for row in rows if row["val_top1"]]
    if not curve:
        raise UserError(f"{metrics}: contains no validation", "give images with a split val")
    wall = json.loads((folder / "finished.json").read_text())["wall_seconds"]
    return Run(curve, float(rows[-1]["seconds"]) / 60, wall / 60)


def with_moments(metric: str, values: list[float]) -> Iterator[Figure]:
    """A quantity over the seeds, and its mean and sample standard deviation if all values are finite."""
    yield Figure(metric, values)
    if all(map(math.isfinite, values)):
        yield Figure(f"{metric}, mean", [mean(values)])
        if len(values) > 1:
            yield Figure(f"{metric}, standard deviation", [stdev(values)])


def figures(runs: Sequence[Run], levels: Sequence[float]) -> Iterator[Figure]:
    """The figures of one contender over its seeds. levels: top-1 accuracies, percent."""
    for level in levels:
        reached = [run.reach(level) for run in runs]
        yield Figure(f"runs reaching {level:g} %", [sum(math.isfinite(epochs) for epochs, _ in reached)])
        yield from with_moments(f"epochs to {level:g} %", [epochs for epochs, _ in reached])
        yield from with_moments(f"minutes to {level:g} %", [minutes for _, minutes in reached])
    yield from with_moments("last top-1, %", [run.curve[-1][2] for run in runs])
    yield from with_moments("minutes", [run.minutes for run in runs])
    yield from with_moments("minutes, start included", [run.wall_minutes for run in runs])


def ratios(runs: Sequence[Run], others: Sequence[Run], levels: Sequence[float]) -> Iterator[Figure]:
    """Times of `runs` over those of `others`, seed by seed. Times to a level are compared only for seeds with which both reach
    it."""
    pairs = list(zip(runs, others, strict=True))
    for level in levels:
        minutes = [(run.reach(level)[1], other.reach(level)[1]) for run, other in pairs]
        both = [time / other for time, other in minutes if math.isfinite(time) and math.isfinite(other)]
        yield Figure(f"seeds with which both reach {level:g} %", [len(both)])
        if both:
            yield from with_moments(f"minutes to {level:g} %, ratio", both)
    yield from with_moments("minutes, ratio", [run.minutes / other.minutes for run, other in pairs])
    yield from with_moments("minutes, start included, ratio", [run.wall_minutes / other.wall_minutes for run, other in pairs])
