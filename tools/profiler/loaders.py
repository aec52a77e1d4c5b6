"""Loaders end to end with nobody training: images a second at each engine, number of threads and depth of prefetching."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import mean
from typing import Any

import torch
from tqdm import tqdm

from pipeline import open_loader
from pipeline.errors import UserError
from pipeline.loader import Batch, Loader
from pipeline.spec import LoaderSpec
from tools.profiler.measuring import Estimate, Usage, in_turns, usage
from tools.profiler.page_cache import drop_pages
from tools.profiler.storage import local_files


@dataclass
class Feed:
    """A loader as configured by `spec`, and its turns: images a second, what they took. error: why it could not be measured."""

    spec: LoaderSpec
    speeds: list[float] = field(default_factory=list)
    usages: list[Usage] = field(default_factory=list)
    error: str | None = None

    @property
    def estimate(self) -> Estimate:
        return Estimate.of_speeds(self.speeds)

    def ratios(self, other: Feed) -> list[float]:
        """Its speed over another's, in each repeat."""
        return [ours / theirs for ours, theirs in zip(self.speeds, other.speeds, strict=True)]

    def over(self, other: Feed) -> Estimate:
        """Their mean, with its interval."""
        return Estimate.of(self.ratios(other))

    @property
    def cpu_share(self) -> float:
        return mean(taken.cpu_share for taken in self.usages)

    def json(self, mean_bytes: float) -> dict[str, Any]:
        """mean_bytes: of an encoded image."""
        spec = self.spec
        found: dict[str, Any] = {"engine": spec.engine, "threads": spec.threads, "prefetch": spec.prefetch, "error": self.error}
        found |= dict.fromkeys(("images_per_s", "low", "high", "cpu_share", "bytes_per_s", "gpu_share", "jpeg_share"))
        if self.error is None:
            found |= self.estimate.json()
            found |= {"cpu_share": self.cpu_share, "bytes_per_s": self.estimate.mean * mean_bytes}
            for name in ("gpu_share", "jpeg_share"):
                known = [share for taken in self.usages if (share := getattr(taken, name)) is not None]
                found[name] = mean(known) if known else None
        return found


def endless(loader: Loader) -> Iterator[Batch]:
    """Epoch after epoch."""
    while True:
        yield from loader


class Opened:
    """A loader that is iterated for ever, in turns: between them it makes nothing, so that others are not disturbed.

    cold: opened anew for every turn, the pages of its shards dropped.
    """

    def __init__(self, spec: LoaderSpec, cold: bool) -> None:
        self._spec, self._cold = spec, cold
        self.loader: Loader | None = None
        self._batches: Iterator[Batch] = iter(())

    def begin(self) -> None:
        """Start, and take and leave the first batches."""
        if self.loader is None or self._cold:
            self.close()
            if self._cold:
                gc.collect()  # maps keep their pages in the cache
                drop_pages(local_files(self._spec))
            self.loader = open_loader(self._spec)
            self._batches = endless(self.loader)
        for _ in range(self._spec.prefetch + 1):
            next(self._batches)

    def end(self) -> None:
        """Stop making batches ahead."""
        if self.loader is not None:
            self.loader.close()

    def next(self) -> Batch:
        return next(self._batches)

    @property
    def ready(self) -> int | None:
        return self.loader.ready() if self.loader else None

    @property
    def left(self) -> int:
        """Images that may be read until they come from the page cache, where that matters."""
        assert self.loader is not None
        if not self._cold:
            return 1 << 62
        return self.loader.total - self.loader.consumed if self.loader.epoch == 0 else 0

    def close(self) -> None:
        self._batches = iter(())
        if self.loader is not None:
            self.loader.close()
            self.loader = None


def measure_feeds(specs: Sequence[LoaderSpec], cold: bool, repeats: int, seconds: float, progress: str) -> list[Feed]:
    """Measure loaders in turns of so many seconds. Those that cannot be opened get an error. progress: what the bar is called."""
    feeds = [Feed(spec) for spec in specs]
    opened = {id(feed): Opened(feed.spec, cold) for feed in feeds}
    bar = tqdm(total=len(feeds) * (repeats + 1), desc=progress, unit=" turns")

    def turn(feed: Feed, counts: bool = True) -> None:
        bar.update()
        if feed.error is None:
            try:
                speed, taken = run(opened[id(feed)], feed.spec, seconds if counts else seconds / 4)
            except UserError as error:
                feed.error = " ".join(str(error).split())
                return
            if counts:
                feed.speeds.append(speed)
                feed.usages.append(taken)

    try:
        for feed in feeds:
            turn(feed, counts=False)
        in_turns(feeds, repeats, turn)
    finally:
        bar.close()
        for loader in opened.values():
            loader.close()
    return feeds


def run(opened: Opened, spec: LoaderSpec, seconds: float) -> tuple[float, Usage]:
    """Images a second over about so long, and what that took."""
    opened.begin()
    synchronise(spec.device)
    count, left = 0, opened.left
    with usage(spec.device) as taken:
        began = time.perf_counter()
        while time.perf_counter() - began < seconds and count + spec.batch_size <= left:
            count += len(opened.next().ids)
        synchronise(spec.device)
    opened.end()
    if count == 0:
        raise UserError(
            f"{spec.data}: a cold page cache cannot be measured with so few images ({left} are left behind the first batches); "
            "take a smaller --batch-size, or --cache-state warm"
        )
    return count / taken.seconds, taken


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def grid(spec: LoaderSpec, engines: Sequence[str], threads: Sequence[int], prefetches: Sequence[int]) -> list[LoaderSpec]:
    """What to measure: the spec's engine at all threads and depths, other engines at all threads and the spec's depth."""
    return [
        replace(spec, engine=engine, threads=count, prefetch=depth)
        for engine in engines
        for count in threads
        for depth in (prefetches if engine == spec.engine else [spec.prefetch])
    ]
