"""Loaders end to end, without training: images per second for each engine, number of threads and prefetch depth."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import mean
from typing import Any

import torch

from pipeline import open_loader
from pipeline.batch import Batch
from pipeline.cli import with_flags
from pipeline.errors import UserError
from pipeline.loader import Loader
from pipeline.progress import progress_bar
from pipeline.spec import LoaderSpec
from tools.profiler.measuring import NEVER, Estimate, Usage, in_turns, shares, usage
from tools.profiler.storage import drop_pages, local_files


@dataclass
class LoaderSpeed:
    """The measurements of the loader of `spec`, one for each repeat: images per second, and what they used.

    error: why the loader could not be measured.
    """

    spec: LoaderSpec
    speeds: list[float] = field(default_factory=list)
    usages: list[Usage] = field(default_factory=list)
    error: str | None = None

    @property
    def estimate(self) -> Estimate:
        return Estimate.of_speeds(self.speeds)

    def ratios(self, other: LoaderSpeed) -> list[float]:
        """Its speed divided by another loader's speed, in each repeat."""
        return [mine / its for mine, its in zip(self.speeds, other.speeds, strict=True)]

    def over(self, other: LoaderSpeed) -> Estimate:
        """The mean of `ratios`, with its interval."""
        return Estimate.of(self.ratios(other))

    @property
    def cpu_share(self) -> float:
        return mean(used.cpu_share for used in self.usages)

    def json(self, mean_bytes: float) -> dict[str, Any]:
        """mean_bytes: mean size of an encoded image."""
        spec = self.spec
        found: dict[str, Any] = {"engine": spec.engine, "threads": spec.threads, "prefetch": spec.prefetch, "error": self.error}
        found |= dict.fromkeys(("images_per_s", "low", "high", "repeats", "cpu_share", "bytes_per_s", "gpu_share", "jpeg_share"))
        if self.error is None:
            found |= self.estimate.json()
            found |= shares(self.usages) | {"bytes_per_s": self.estimate.mean * mean_bytes}
        return found


def endless(loader: Loader) -> Iterator[Batch]:
    """Epoch after epoch."""
    while True:
        yield from loader


class PausableLoader:
    """An endless loader that does not prefetch while it is paused, so that it does not disturb other measurements.

    cold: each `resume` drops the shards from the page cache and opens a new loader.
    """

    def __init__(self, spec: LoaderSpec, cold: bool) -> None:
        self._spec, self._cold = spec, cold
        self._loader: Loader | None = None
        self._batches: Iterator[Batch] = iter(())

    def resume(self) -> None:
        """Start prefetching, and discard the first batches."""
        if self._loader is None or self._cold:
            self.close()
            if self._cold:
                gc.collect()  # mapped pages would stay in the cache
                drop_pages(local_files(self._spec))
            self._loader = open_loader(self._spec)
            self._batches = endless(self._loader)
        for _ in range(self._spec.prefetch + 1):
            next(self._batches)

    def pause(self) -> None:
        """Stop prefetching."""
        if self._loader is not None:
            self._loader.close()

    def next(self) -> Batch:
        return next(self._batches)

    @property
    def ready(self) -> int | None:
        """The number of batches in the prefetch queue; None if the engine does not know."""
        return self._loader.ready() if self._loader else None

    @property
    def images_left(self) -> int:
        """With a cold page cache: images left in the first epoch, because later epochs would read from memory. Otherwise no
        limit."""
        assert self._loader is not None
        if not self._cold:
            return 1 << 62
        return self._loader.total - self._loader.consumed if self._loader.epoch == 0 else 0

    def close(self) -> None:
        self._batches = iter(())
        if self._loader is not None:
            self._loader.close()
            self._loader = None


def measure_loaders(
    specs: Sequence[LoaderSpec], cold: bool, repeats: int, seconds: float, progress: str, until: float = NEVER
) -> list[LoaderSpeed]:
    """Measure the loaders, with interleaved repeats. One that cannot be opened gets an error.

    seconds: duration of each measurement. progress: the progress bar's label. until: as in `in_turns`.
    """
    measured = [LoaderSpeed(spec) for spec in specs]
    opened = {id(one): PausableLoader(one.spec, cold) for one in measured}
    bar = progress_bar(total=len(measured) * (repeats + 1), desc=progress, unit=" measurements")

    def turn(one: LoaderSpeed, is_warmup: bool = False) -> None:
        bar.update()
        if one.error is None:
            try:
                speed, used = measure_once(opened[id(one)], one.spec, seconds / 4 if is_warmup else seconds)
            except UserError as error:
                one.error = with_flags(str(error))
                return
            if not is_warmup:
                one.speeds.append(speed)
                one.usages.append(used)

    try:
        for one in measured:
            turn(one, is_warmup=True)
        in_turns(measured, repeats, turn, until=until)
    finally:
        bar.close()
        for loader in opened.values():
            loader.close()
    return measured


def measure_once(loader: PausableLoader, spec: LoaderSpec, seconds: float) -> tuple[float, Usage]:
    """Images per second, measured for about `seconds`, and the utilization meanwhile. loader: of `spec`; paused before and
    after."""
    loader.resume()
    synchronise(spec.device)
    count, left = 0, loader.images_left
    with usage(spec.device) as used:
        began = time.perf_counter()
        while time.perf_counter() - began < seconds and count + spec.batch_size <= left:
            count += len(loader.next().ids)
        synchronise(spec.device)
    loader.pause()
    if count == 0:
        raise UserError(
            f"{spec.data}: has too few images to measure with a cold page cache ({left} are left after the first batches)",
            "use a smaller --batch-size, or --cache-state warm",
        )
    return count / used.seconds, used


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def repeated(call: Callable[[], object], seconds: float, device: str) -> tuple[float, int]:
    """Calls per second over about `seconds`, with an idle device at the start and at the end; and their number, at least one."""
    synchronise(device)
    began, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - began < seconds:
        call()
        count += 1
    synchronise(device)
    return count / (time.perf_counter() - began), count


def grid(spec: LoaderSpec, engines: Sequence[str], threads: Sequence[int], prefetches: Sequence[int]) -> list[LoaderSpec]:
    """The specs to measure: the spec's engine with all threads and depths; other engines with all threads at the spec's depth."""
    return [
        replace(spec, engine=engine, threads=count, prefetch=depth)
        for engine in engines
        for count in threads
        for depth in (prefetches if engine == spec.engine else [spec.prefetch])
    ]
