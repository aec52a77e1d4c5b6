"""Measures contenders in turns. Each is warmed up once, and runs for some seconds in every repeat, in a new random order."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tqdm import tqdm

from tools.bench.peers.contenders import Contender
from tools.bench.peers.job import Job
from tools.bench.peers.runner import ContenderError, Runner


@dataclass
class Result:
    """A contender's figures. images_per_s, cpu_ms: a value per repeat; CPU time in milliseconds per image.

    kb_per_image: size of what it reads, 1,000 bytes. error: one line with the reason if the contender could not be measured.
    runner: its process, until it is stopped.
    """

    contender: Contender
    versions: str = ""
    images_per_s: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    kb_per_image: float | None = None
    error: str | None = None
    runner: Runner | None = None

    @contextmanager
    def trying(self) -> Iterator[None]:
        """A context in which a failure stops only this contender."""
        try:
            yield
        except ContenderError as error:
            self.error = str(error)
            self.stop()

    def stop(self) -> None:
        if self.runner:
            self.runner.close()
        self.runner = None


def measure(
    chosen: list[Contender], jobs: dict[str, Job], repeats: int, seconds: float, pythons: dict[str, str], errors: dict[str, str]
) -> list[Result]:
    """Measure the chosen contenders. seconds: duration of each turn. jobs: by kind of data. pythons: contender's name -> its
    Python, by default the one that runs this script. errors: name:data -> why a contender cannot take part."""
    results = [Result(contender, error=errors.get(contender.key)) for contender in chosen]
    try:
        for result in tqdm(results, "warming up", unit=" contenders"):
            if result.error is None:
                with result.trying():
                    start(result, jobs[result.contender.data], pythons)
        order = random.Random(0)
        turns = [result for _ in range(repeats) for result in order.sample(results, len(results))]
        for result in tqdm(turns, "measuring", unit=" turns"):
            if result.runner:
                with result.trying():
                    images_per_s, cpu_ms = result.runner.run(seconds)
                    result.images_per_s.append(images_per_s)
                    result.cpu_ms.append(cpu_ms)
    finally:
        for result in results:
            result.stop()
    return results


def start(result: Result, job: Job, pythons: dict[str, str]) -> None:
    result.runner = Runner(result.contender, pythons.get(result.contender.name, sys.executable))
    result.runner.open(job)
    result.versions = result.runner.versions
    result.kb_per_image = result.contender.kb_per_image(job)  # now, as some contenders write their files when they are opened
