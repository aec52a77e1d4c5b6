"""--tune: the threads and the prefetch depth that feed fastest, found in less than a minute."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from tqdm import tqdm

from pipeline.spec import LoaderSpec
from tools.profiler.loaders import Opened, run

BUDGET = 45.0  # seconds, openings included
TURN = 0.3  # seconds
HOPELESS = 0.9  # of the best, below which a setting is given up, after two turns
SIMILAR = 0.98  # of the best, from which the cheapest setting is taken: threads and memory are others' too
MOST_TURNS = 8  # of a setting


@dataclass(frozen=True)
class Tuned:
    """The setting chosen, its images a second, and how long the search took."""

    spec: LoaderSpec
    images_per_s: float
    seconds: float


def tune(specs: Sequence[LoaderSpec], cold: bool, budget: float = BUDGET) -> Tuned:
    """The best of `specs`, which ascend in what they cost. Settings that fall behind are given up: the rest have more turns.

    Raises UserError as opening a loader does.
    """
    began = time.perf_counter()
    speeds: dict[int, list[float]] = {number: [] for number in range(len(specs))}
    opened = [Opened(spec, cold) for spec in specs]
    alive = list(speeds)
    order = random.Random(0)
    bar = tqdm(total=round(budget), desc="tuning", unit=" s", bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}{postfix}")
    try:
        for turn in range(MOST_TURNS):
            for number in order.sample(alive, len(alive)):
                if time.perf_counter() - began > budget and all(speeds[other] for other in alive):
                    break
                speeds[number].append(run(opened[number], specs[number], TURN)[0])
                bar.update(min(round(time.perf_counter() - began), bar.total) - bar.n)
            best = max(median(speeds[number]) for number in alive)
            if turn >= 1:
                alive = [number for number in alive if median(speeds[number]) >= HOPELESS * best]
            bar.set_postfix_str(f"{len(alive)} settings left, best {best:,.0f} images/s")
            if len(alive) == 1 or time.perf_counter() - began > budget:
                break
    finally:
        bar.close()
        for loader in opened:
            loader.close()
    best = max(median(speeds[number]) for number in alive)
    chosen = next(number for number in alive if median(speeds[number]) >= SIMILAR * best)
    return Tuned(specs[chosen], median(speeds[chosen]), time.perf_counter() - began)
