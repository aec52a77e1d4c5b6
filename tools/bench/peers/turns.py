"""Measures contenders in turns. Each is warmed up once, and runs for some seconds in every repeat, in a new random order."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO

from tqdm import tqdm

from pipeline.errors import UserError
from pipeline.profile.runner import PATIENCE, Runner
from pipeline.profile.worker import DRAIN
from tools import ROOT
from tools.bench.peers.contenders import Contender
from tools.bench.peers.job import CONTENDER, LOADER, Job

OPENING = 120.0  # seconds at most to import, compile and make a batch
WARM = 1.0  # seconds of warm-up, at least
VERSIONS = """
import sys; from importlib.metadata import distributions
found = {str(one.name).lower().replace("_", "-"): one.version for one in distributions()}
print(", ".join(f"{name} {found[name]}" for name in sys.argv[1:] if name in found))
"""


@dataclass
class Result:
    """A contender's figures. images_per_s, cpu_ms: a value per repeat; CPU time in milliseconds per image.

    kb_per_image: size of what it reads, 1,000 bytes. error: one line with the reason if the contender could not be measured.
    runner: its process, until it is stopped. log: what that has printed.
    """

    contender: Contender
    versions: str = ""
    images_per_s: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    kb_per_image: float | None = None
    error: str | None = None
    runner: Runner | None = None
    log: IO[bytes] = field(default_factory=tempfile.TemporaryFile)

    @contextmanager
    def trying(self) -> Iterator[None]:
        """A context in which a failure stops only this contender."""
        try:
            yield
        except (UserError, OSError) as error:
            self.error = self._in_words(error)
            self.stop()

    def _in_words(self, error: UserError | OSError) -> str:
        """Why the contender failed: what its code raised, or the last line that a dead process has printed."""
        text = error.problem.removeprefix(f"{self.contender.name}: ") if isinstance(error, UserError) else str(error)
        text = re.sub(r"^`loader` \S+: ", "", text)
        if missing := re.search(r"(ModuleNotFound|Import)Error: .*", text):
            return f"not installed: {self.contender.install} ({missing[0]})"
        self.log.seek(0)
        last = self.log.read().decode(errors="replace").strip().splitlines()[-1:] if "process ended" in text else []
        return ": ".join([text, *last])

    def stop(self) -> None:
        if self.runner:
            self.runner.close()
        self.runner = None

    def start(self, job: Job, python: str) -> None:
        """Open the contender, check its batch and run it for at least an epoch, in a process of this Python."""
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        variables = os.environ | {"PYTHONPATH": paths, CONTENDER: json.dumps([self.contender.function, job])}
        command = [python, "-c", VERSIONS, *self.contender.packages]
        self.versions = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False).stdout.strip()
        self.runner = Runner(self.contender.name, python, env=variables, stdout=self.log, stderr=self.log)
        found = self.runner.ask("open", LOADER, timeout=OPENING).batch
        shape = job.batch_size, job.size, job.size, 3
        if (found.dtype, found.shape) != (job.out, shape):
            raise UserError(f"its batch is {found.dtype} {found.shape}, not {job.out} {shape}")
        self.kb_per_image = self.contender.kb_per_image(job)  # now, as some contenders write their files when they are opened
        images = 0
        while images < job.images:
            images += self.runner.ask("warm", WARM, timeout=PATIENCE).images

    def run(self, seconds: float) -> None:
        """Measure for about `seconds`. Batches that may have been made before do not count."""
        if self.runner:
            turn = self.runner.ask("run", seconds / (1 - DRAIN), None, timeout=seconds + PATIENCE)
            self.images_per_s.append(turn.images / turn.seconds)
            self.cpu_ms.append(1e3 * turn.cpu_seconds / turn.images)


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
                    result.start(jobs[result.contender.data], pythons.get(result.contender.name, sys.executable))
        order = random.Random(0)
        turns = [result for _ in range(repeats) for result in order.sample(results, len(results))]
        for result in tqdm(turns, "measuring", unit=" turns"):
            with result.trying():
                result.run(seconds)
    finally:
        for result in results:
            result.stop()
    return results
