"""Possible changes (remedies) and their predicted gains.

The loader's speed after a change is either measured (other numbers of threads, prefetch depths and engines) or predicted from the
stages. The model behind the prediction: the time per image and thread is the sum over the stages that the engine uses, and the
change shortens one of them. Training is as fast as the slower one of loader and train step. If both share the cores, their CPU
times add up.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from pipeline.spec import LoaderSpec
from tools.profiler.loaders import LoaderSpeed
from tools.profiler.stages import Stages
from tools.profiler.storage import MEMORY
from tools.profiler.training import Training

# The easiest first: an option, another engine, a copy in memory, other shards, another machine.
ORDER = ("threads", "prefetch", "engine", "cache", "profile", "machine")
WORTH = 1.05  # remedies with a smaller predicted gain are not mentioned
WITHIN_ENGINE = 0.6  # if the stages take less than this share of a loader's time per image, the engine itself is the bottleneck
SIMILAR = 0.97  # the cheapest setting that reaches this share of the best is chosen


@dataclass(frozen=True)
class Remedy:
    """A change to make. kind: in schema.json, `remedy`. change: what to do, as text. gain: predicted. spec: of the changed
    loader; None if the remedy cannot be tried on this machine."""

    kind: str
    change: str
    gain: float
    spec: LoaderSpec | None = None

    def json(self) -> dict[str, Any]:
        return {"remedy": self.kind, "change": self.change, "predicted_gain": self.gain}


@dataclass(frozen=True)
class Converted:
    """A sample of the data set in another shard profile. spec: loads it. mean_bytes: mean size of an encoded image.

    before: the stages on the original data set, measured at the same time.
    """

    profile: str
    spec: LoaderSpec
    stages: Stages
    before: Stages
    mean_bytes: float


@dataclass(frozen=True)
class Situation:
    """All measurements that a verdict depends on.

    - now: the loader as configured, one of `loaders`.
    - used: the stages that the engine uses in this state of the page cache.
    - training: None if no demand was given.
    - mean_bytes: mean size of an encoded image. data_bytes: size of all shards.
    - memory: bytes available for a copy of the data in memory. cached_read_ms: time to read an image from such a copy.
    - other: a sample of the data in another shard profile, if one was converted.
    - faster: another precision, and the train step's images per second in it, if measured.
    """

    now: LoaderSpeed
    loaders: list[LoaderSpeed]
    stages: Stages
    used: tuple[str, ...]
    training: Training | None
    cores: int
    mean_bytes: float
    data_bytes: int
    memory: int
    cached_read_ms: float
    other: Converted | None = None
    faster: tuple[str, float] | None = None

    def ms(self, name: str) -> float:
        """A stage's time per image and thread, milliseconds, at the configured number of threads."""
        return self.stages.measured[name].ms_per_image(self.now.spec.threads)

    @property
    def total_ms(self) -> float:
        """The same, summed over the stages that are used."""
        return sum(self.ms(name) for name in self.used)

    @property
    def shares_cores(self) -> bool:
        """Whether the train step and the loader run on the same cores."""
        return bool(self.training and not self.training.consumer.emulated and self.now.spec.device == "cpu")

    def training_speed(self, loader_speed: float, cpu_seconds: float, demand: float | None = None) -> float:
        """Predicted images per second of training or, without a demand, of the loader.

        loader_speed: images per second of the loader alone. cpu_seconds: its CPU time per image. demand: images per second of the
        train step alone, by default as measured.
        """
        if self.training is None:
            return loader_speed
        demand = demand or self.training.demand.mean
        return min(loader_speed, 1 / (1 / demand + cpu_seconds / self.cores) if self.shares_cores else demand)

    @property
    def speed_now(self) -> float:
        """`training_speed` as configured."""
        return self.training_speed(self.now.estimate.mean, self.cpu_seconds(self.now))

    def gain(self, loader_speed: float, cpu_seconds: float) -> float:
        """`training_speed` divided by the current one."""
        return self.training_speed(loader_speed, cpu_seconds) / self.speed_now

    @property
    def limiting(self) -> str:
        """The slowest stage; "engine" if the stages account for too little of the loader's time per image."""
        threads = self.now.spec.threads
        if self.total_ms < WITHIN_ENGINE * 1e3 * threads / self.now.estimate.mean:
            return "engine"
        return max(self.used, key=self.ms)

    def cpu_seconds(self, loader: LoaderSpeed) -> float:
        """A loader's CPU time per image."""
        return loader.cpu_share * self.cores / loader.estimate.mean

    def with_ms(self, total_ms: float) -> tuple[float, float]:
        """The predicted speed of the loader, and its CPU seconds per image, if the used stages took `total_ms` together.

        The time per image outside the stages is assumed to stay the same. If reading is the bottleneck, it is assumed to be 0,
        because it is smaller than the noise of reading.
        """
        now_ms = 1e3 * self.now.spec.threads / self.now.estimate.mean
        overhead = 0.0 if self.limiting.startswith("read") else max(0.0, now_ms - self.total_ms)
        speed = 1e3 * self.now.spec.threads / (total_ms + overhead)
        return speed, min(self.cpu_seconds(self.now), total_ms / 1e3)


def remedies(situation: Situation) -> list[Remedy]:
    """Changes to the input that gain at least WORTH, the easiest first."""
    found = [*settings(situation), *caches(situation), *profiles(situation), machine(situation)]
    return sorted((remedy for remedy in found if remedy.gain >= WORTH), key=lambda remedy: ORDER.index(remedy.kind))


def easiest(found: list[Remedy]) -> Remedy | None:
    """The first remedy with at least half of the best one's gain; another machine only if nothing else helps."""
    software = [remedy for remedy in found if remedy.kind != "machine"] or found
    most = max((remedy.gain - 1 for remedy in software), default=0.0)
    return next((remedy for remedy in software if remedy.gain - 1 >= most / 2), None)


def settings(situation: Situation) -> Iterator[Remedy]:
    """Another number of threads, prefetch depth or engine, as measured: of each, the cheapest one that is about as fast as the
    best."""
    now = situation.now.spec
    measured = [loader for loader in situation.loaders if loader.error is None]
    ways = {
        "threads": [loader for loader in measured if replace(loader.spec, threads=now.threads) == now],
        "prefetch": [loader for loader in measured if replace(loader.spec, prefetch=now.prefetch) == now],
        "engine": [loader for loader in measured if replace(loader.spec, engine=now.engine) == now],
    }
    for kind, loaders in ways.items():
        best = max(loader.estimate.mean for loader in loaders)
        chosen = next(loader for loader in loaders if loader.estimate.mean >= SIMILAR * best)  # they ascend in cost
        if chosen is situation.now or chosen.over(situation.now).low <= 1:
            continue  # not significantly faster
        gain = situation.gain(chosen.estimate.mean, situation.cpu_seconds(chosen))
        yield Remedy(kind, f"--{kind} {getattr(chosen.spec, kind)}", gain, chosen.spec)


def caches(situation: Situation) -> Iterator[Remedy]:
    """A copy of the shards in memory, if it fits and no cache is configured."""
    spec = situation.now.spec
    if spec.cache is None and situation.data_bytes < situation.memory:
        (read,) = (name for name in situation.used if name.startswith("read"))
        total_ms = situation.total_ms - situation.ms(read) + situation.cached_read_ms
        folder = os.path.join(MEMORY, "cropfeed")
        change = f"--cache {folder} (a copy of the shards in memory, {situation.data_bytes / 1e9:.3g} GB)"
        yield Remedy("cache", change, situation.gain(*situation.with_ms(total_ms)), replace(spec, cache=folder))


def profiles(situation: Situation) -> Iterator[Remedy]:
    """Shards of the same images in another profile."""
    other, threads = situation.other, situation.now.spec.threads
    if other:
        total_ms = 0.0
        for name in situation.used:
            if name.startswith("read"):  # the sample is on another storage: in proportion to the bytes
                total_ms += situation.ms(name) * other.mean_bytes / situation.mean_bytes
            else:
                after, before = (stages.measured[name].ms_per_image(threads) for stages in (other.stages, other.before))
                total_ms += situation.ms(name) * after / before
        change = f"convert to profile {other.profile}: python tools/make_shards.py SRC --out OUT --profile {other.profile}"
        yield Remedy("profile", change, situation.gain(*situation.with_ms(total_ms)), other.spec)


def machine(situation: Situation) -> Remedy:
    """More of the resource that is the bottleneck: twice as much, or as much as the demand needs."""
    now, training = situation.now, situation.training
    factor = min(2.0, training.demand.mean / now.estimate.mean) if training else 2.0
    more = "the storage or network speed" if situation.limiting.startswith("read") else "the cores, in one host or several"
    change = f"{factor:.1f} times {more}"
    return Remedy("machine", change, situation.gain(factor * now.estimate.mean, situation.cpu_seconds(now)))


def compute_remedies(situation: Situation) -> list[Remedy]:
    """Changes to the train step that gain at least WORTH: a faster precision, if one was measured, and a second device."""
    training, now = situation.training, situation.now
    assert training
    found = []
    if situation.faster:
        precision, demand = situation.faster
        speed = situation.training_speed(now.estimate.mean, situation.cpu_seconds(now), demand)
        found.append(Remedy("precision", f"train in mixed precision: --amp {precision}", speed / situation.speed_now, now.spec))
    speed = min(2 * training.demand.mean, now.estimate.mean)
    change = "a train step up to twice as fast (a second device, a smaller model or torch.compile)"
    found.append(Remedy("device", change, speed / situation.speed_now, now.spec))
    return [remedy for remedy in found if remedy.gain >= WORTH]
