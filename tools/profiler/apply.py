"""--apply: try the chosen remedy, with repeats that are interleaved with those of the current configuration, and measure its
gain."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from pipeline.cli import with_flags
from pipeline.errors import UserError
from pipeline.spec import LoaderSpec
from pipeline.store.shards import ShardSet
from tools.profiler.loaders import measure_loaders
from tools.profiler.measuring import Estimate
from tools.profiler.remedies import Remedy, Situation
from tools.profiler.storage import MEMORY
from tools.profiler.training import Consumer, measure_training
from tools.profiler.verdict import Verdict

MOST_COPIED = 8 << 30  # bytes of shards; larger data sets are not copied to memory for a trial

MakeConsumer = Callable[..., Consumer | None]


def apply(
    verdict: Verdict, situation: Situation, cold: bool, repeats: int, seconds: float, consumer: MakeConsumer, until: float
) -> dict[str, Any]:
    """Measure the gain of the chosen remedy, in the format of schema.json. consumer: returns a consumer of another precision or
    demand. until: as in `in_turns`."""
    remedy = verdict.chosen or Remedy("none", "nothing", 1.0)
    found = remedy.json() | {"measured_gain": None, "low": None, "high": None, "gains": [], "error": None}
    if remedy.spec is None:
        return found | {"error": "there is no remedy to try" if verdict.chosen is None else "it cannot be tried on this machine"}
    with ExitStack() as stack:
        try:
            spec = cached_in_memory(remedy.spec, situation, stack) if remedy.kind == "cache" else remedy.spec
            gains = measure_gains(remedy, situation, spec, cold, repeats, seconds, consumer, until)
        except UserError as error:
            return found | {"error": with_flags(str(error))}
    gain = Estimate.of(gains)
    return found | {"measured_gain": gain.mean, "low": gain.low, "high": gain.high, "gains": gains}


def measure_gains(
    remedy: Remedy,
    situation: Situation,
    spec: LoaderSpec,
    cold: bool,
    repeats: int,
    seconds: float,
    consumer: MakeConsumer,
    until: float,
) -> list[float]:
    """The speed with the remedy, divided by the current speed, in each repeat."""
    before = situation.now.spec
    if situation.training is None:
        old, new = measure_loaders([before, spec], cold, repeats, seconds, "remedy", until)
        for loader in (old, new):
            if loader.error:
                raise UserError(loader.error)
        return new.ratios(old)
    present: Consumer = situation.training.consumer
    changed: Consumer | None = present
    if remedy.kind == "precision":
        changed = consumer(precision=remedy.change.split()[-1])
    elif remedy.kind == "device":
        changed = consumer(demand=2 * situation.training.demand.mean)
    assert changed
    ways = [(before, present), (spec, changed)]
    old_run, new_run = measure_training(ways, cold, repeats, 2 * seconds, "remedy", ("together",), until)
    return [b.images_per_s / a.images_per_s for a, b in zip(old_run.windows, new_run.windows, strict=True)]


def cached_in_memory(spec: LoaderSpec, situation: Situation, stack: ExitStack) -> LoaderSpec:
    """The spec with a cache in memory that already holds all shards. `stack` removes it."""
    if situation.data_bytes > MOST_COPIED:
        raise UserError(
            f"the trial would copy {situation.data_bytes / 1e9:.0f} GB to {MEMORY}", "train with --cache to see its gain"
        )
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="cropfeed-profile-", dir=MEMORY))
    spec = replace(spec, cache=folder)
    shards = ShardSet(spec.data, spec.split, spec.cache, spec.cache_gb)
    for shard in range(len(shards.sizes)):
        shards.read(sum(shards.sizes[:shard]))  # reading any image caches its whole shard
    return spec
