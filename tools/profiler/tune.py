"""--tune: the number of threads and the prefetch depth with the highest throughput, found in less than a minute."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from pipeline.progress import progress_bar
from pipeline.spec import LoaderSpec
from tools.profiler.loaders import PausableLoader, measure_once

BUDGET = 45.0  # seconds, including the opening of loaders
TURN = 0.3  # seconds of each measurement
HOPELESS = 0.9  # a setting slower than this share of the best is dropped, after two measurements
SIMILAR = 0.98  # the cheapest setting that reaches this share of the best is chosen
MOST_TURNS = 8  # measurements of a setting


@dataclass(frozen=True)
class Tuned:
    """The chosen setting, its images per second, and how long the search took."""

    spec: LoaderSpec
    images_per_s: float
    seconds: float


def tune(specs: Sequence[LoaderSpec], cold: bool, budget: float = BUDGET) -> Tuned:
    """The best of `specs`, which ascend in cost. Slow settings are dropped early, which leaves more time for the others.

    Raises UserError if a loader cannot be opened.
    """
    began = time.perf_counter()
    speeds: dict[int, list[float]] = {number: [] for number in range(len(specs))}
    opened = [PausableLoader(spec, cold) for spec in specs]
    candidates = list(speeds)
    order = random.Random(0)
    bar = progress_bar(
        total=round(budget), desc="tuning", unit=" s", bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}{postfix}"
    )
    try:
        for turn in range(MOST_TURNS):
            for number in order.sample(candidates, len(candidates)):
                if time.perf_counter() - began > budget and all(speeds[other] for other in candidates):
                    break
                speeds[number].append(measure_once(opened[number], specs[number], TURN)[0])
                bar.update(min(round(time.perf_counter() - began), bar.total) - bar.n)
            best = max(median(speeds[number]) for number in candidates)
            if turn >= 1:
                candidates = [number for number in candidates if median(speeds[number]) >= HOPELESS * best]
            bar.set_postfix_str(f"{len(candidates)} settings left, best {best:,.0f} images/s")
            if len(candidates) == 1 or time.perf_counter() - began > budget:
                break
    finally:
        bar.close()
        for loader in opened:
            loader.close()
    best = max(median(speeds[number]) for number in candidates)
    chosen = next(number for number in candidates if median(speeds[number]) >= SIMILAR * best)
    return Tuned(specs[chosen], median(speeds[chosen]), time.perf_counter() - began)
