"""What could be changed, and what each change is predicted to gain.

A loader's speed after a change is either measured (other threads, depths and engines are in the sweep of loaders) or follows from
the stages: what an image takes in a thread, the sum over the stages that the engine goes through, becomes less. Training's speed
follows from the loader's and the train step's: the lesser of the two, or, where they share the cores, what is left of these.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from pipeline.spec import LoaderSpec
from tools.profiler.loaders import Feed
from tools.profiler.stages import Stages
from tools.profiler.storage import MEMORY
from tools.profiler.training import Training

# The nearest first: an option, another engine, a copy in memory, other shards, another machine.
ORDER = ("threads", "prefetch", "engine", "cache", "profile", "machine")
WORTH = 1.05  # gain from which a remedy is worth naming
WITHIN_ENGINE = 0.6  # of a loader's time per image: if its stages take less, most is spent in the engine itself
SIMILAR = 0.97  # of the best, from which the cheaper of two settings is taken


@dataclass(frozen=True)
class Remedy:
    """kind: of the schema's. change: what to do, in words. gain: predicted. spec: the changed loader, None where a changed spec
    alone cannot show it."""

    kind: str
    change: str
    gain: float
    spec: LoaderSpec | None = None

    def json(self) -> dict[str, Any]:
        return {"remedy": self.kind, "change": self.change, "predicted_gain": self.gain}


@dataclass(frozen=True)
class Converted:
    """A sample of the data set in another profile: what loads it, its stages, and the mean bytes of an image.

    before: the stages on the data set as it is, measured at the same time.
    """

    profile: str
    spec: LoaderSpec
    stages: Stages
    before: Stages
    mean_bytes: float


@dataclass(frozen=True)
class Situation:
    """All that was measured. now: the loader as configured, also one of `feeds`. training: None if no demand was given.

    used: stages that the engine goes through in this state of the page cache. mean_bytes: of an encoded image. data_bytes: of
    all shards.
    memory: bytes that a copy of the data may take in memory. cached_read_ms: of reading an image of such a copy.
    other: another profile of shards, measured on a sample; None where there is none, or no need.
    faster: a precision, and images a second of the train step in it, where that is another one and faster.
    """

    now: Feed
    feeds: list[Feed]
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
        """What a stage takes of a thread for an image, milliseconds, at the configured number of threads."""
        return self.stages.measured[name].ms_per_image(self.now.spec.threads)

    @property
    def total_ms(self) -> float:
        """Of all stages that are used."""
        return sum(self.ms(name) for name in self.used)

    @property
    def shares_cores(self) -> bool:
        """Whether the train step computes on the cores that the loader works on."""
        return bool(self.training and not self.training.consumer.emulated and self.now.spec.device == "cpu")

    def training_speed(self, feed: float, cpu_seconds: float, demand: float | None = None) -> float:
        """Images a second of training (of the loader, without a demand) if the loader alone gives `feed` images a second and
        takes so many CPU seconds for one. demand: of the train step alone, if it is not the measured one."""
        if self.training is None:
            return feed
        demand = demand or self.training.demand.mean
        return min(feed, 1 / (1 / demand + cpu_seconds / self.cores) if self.shares_cores else demand)

    @property
    def speed_now(self) -> float:
        """`training_speed` as it is."""
        return self.training_speed(self.now.estimate.mean, self.cpu_seconds(self.now))

    def gain(self, feed: float, cpu_seconds: float) -> float:
        """Of training, or of the loader."""
        return self.training_speed(feed, cpu_seconds) / self.speed_now

    @property
    def limiting(self) -> str:
        """The stage that takes most of an image's time; "engine" if what the engine takes is mostly none of them."""
        threads = self.now.spec.threads
        if self.total_ms < WITHIN_ENGINE * 1e3 * threads / self.now.estimate.mean:
            return "engine"
        return max(self.used, key=self.ms)

    def cpu_seconds(self, feed: Feed) -> float:
        """CPU time of an image."""
        return feed.cpu_share * self.cores / feed.estimate.mean

    def with_ms(self, total_ms: float) -> tuple[float, float]:
        """The loader's speed and CPU seconds of an image if the used stages took so long together.

        What an image takes beside its stages stays. Where reading is most of it, that cannot be told from the noise of reading.
        """
        now_ms = 1e3 * self.now.spec.threads / self.now.estimate.mean
        beside = 0.0 if self.limiting.startswith("read") else max(0.0, now_ms - self.total_ms)
        speed = 1e3 * self.now.spec.threads / (total_ms + beside)
        return speed, min(self.cpu_seconds(self.now), total_ms / 1e3)


def remedies(situation: Situation) -> list[Remedy]:
    """Changes to the input that are worth it, the nearest first."""
    found = [*settings(situation), *caches(situation), *profiles(situation), machine(situation)]
    return sorted((remedy for remedy in found if remedy.gain >= WORTH), key=lambda remedy: ORDER.index(remedy.kind))


def nearest(found: list[Remedy]) -> Remedy | None:
    """The first that gains at least half of what the best one gains; another machine only where nothing else helps."""
    software = [remedy for remedy in found if remedy.kind != "machine"] or found
    most = max((remedy.gain - 1 for remedy in software), default=0.0)
    return next((remedy for remedy in software if remedy.gain - 1 >= most / 2), None)


def settings(situation: Situation) -> Iterator[Remedy]:
    """Other numbers of threads, depths and engines, as measured; the cheapest of those that are as good as the best."""
    now = situation.now.spec
    measured = [feed for feed in situation.feeds if feed.error is None]
    ways = {
        "threads": [feed for feed in measured if replace(feed.spec, threads=now.threads) == now],
        "prefetch": [feed for feed in measured if replace(feed.spec, prefetch=now.prefetch) == now],
        "engine": [feed for feed in measured if replace(feed.spec, engine=now.engine) == now],
    }
    for kind, feeds in ways.items():
        best = max(feed.estimate.mean for feed in feeds)
        chosen = next(feed for feed in feeds if feed.estimate.mean >= SIMILAR * best)  # feeds ascend in threads and depth
        if chosen is situation.now or chosen.over(situation.now).low <= 1:
            continue  # it may be chance
        gain = situation.gain(chosen.estimate.mean, situation.cpu_seconds(chosen))
        yield Remedy(kind, f"--{kind} {getattr(chosen.spec, kind)}", gain, chosen.spec)


def caches(situation: Situation) -> Iterator[Remedy]:
    """A copy of the shards in memory, if it fits and there is none yet."""
    spec = situation.now.spec
    if spec.cache is None and situation.data_bytes < situation.memory:
        (read,) = (name for name in situation.used if name.startswith("read"))
        total_ms = situation.total_ms - situation.ms(read) + situation.cached_read_ms
        folder = os.path.join(MEMORY, "cropfeed")
        change = f"--cache {folder} (a copy of the shards in memory, {situation.data_bytes / 1e9:.3g} GB)"
        yield Remedy("cache", change, situation.gain(*situation.with_ms(total_ms)), replace(spec, cache=folder))


def profiles(situation: Situation) -> Iterator[Remedy]:
    """Other shards of the same images."""
    other, threads = situation.other, situation.now.spec.threads
    if other:
        total_ms = 0.0
        for name in situation.used:
            if name.startswith("read"):  # from the same storage, but fewer bytes; the sample lies elsewhere
                total_ms += situation.ms(name) * other.mean_bytes / situation.mean_bytes
            else:
                after, before = (stages.measured[name].ms_per_image(threads) for stages in (other.stages, other.before))
                total_ms += situation.ms(name) * after / before
        change = f"shards of profile {other.profile}: python tools/make_shards.py SRC --out OUT --profile {other.profile}"
        yield Remedy("profile", change, situation.gain(*situation.with_ms(total_ms)), other.spec)


def machine(situation: Situation) -> Remedy:
    """More of what limits here: twice of it, or as much as the demand asks for."""
    now, training = situation.now, situation.training
    factor = min(2.0, training.demand.mean / now.estimate.mean) if training else 2.0
    what = "storage, or network to it," if situation.limiting.startswith("read") else "cores, here or on other hosts,"
    change = f"{factor:.1f} × the {what} of this machine"
    return Remedy("machine", change, situation.gain(factor * now.estimate.mean, situation.cpu_seconds(now)))


def compute_remedies(situation: Situation) -> list[Remedy]:
    """Changes to the train step that are worth it: a faster precision, if one was measured; a second device."""
    training, now = situation.training, situation.now
    assert training
    found = []
    if situation.faster:
        precision, demand = situation.faster
        speed = situation.training_speed(now.estimate.mean, situation.cpu_seconds(now), demand)
        found.append(Remedy("precision", f"--precision {precision}", speed / situation.speed_now, now.spec))
    carried = min(2 * training.demand.mean, now.estimate.mean)
    change = "a train step twice as fast (a second device, or a smaller or compiled net), which this loader can feed"
    found.append(Remedy("device", change, carried / situation.speed_now, now.spec))
    return [remedy for remedy in found if remedy.gain >= WORTH]
