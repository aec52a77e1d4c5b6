"""Starts a contender's process, sends it orders, and kills it with all its children."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import tempfile
from contextlib import suppress
from typing import Any

from tools import ROOT
from tools.bench.peers.contenders import Contender
from tools.bench.peers.job import Job

OPENING = 120.0  # seconds at most to import, compile and run an epoch
PATIENCE = 60.0  # seconds at most beyond the duration of a run
WARM = 1.0  # seconds of warm-up, at least


class ContenderError(Exception):
    """Why a contender cannot be measured, in one line."""


class Runner:
    """One contender in its own process and session, so that `close` kills it with all its children."""

    def __init__(self, contender: Contender, python: str) -> None:
        self.contender = contender
        self.versions = ""
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in `close`
        self._connection, other = multiprocessing.Pipe()
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        try:
            self._process = subprocess.Popen(
                [python, "-m", "tools.bench.peers.worker", str(other.fileno())],
                pass_fds=[other.fileno()],
                env=os.environ | {"PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                start_new_session=True,
            )
        except OSError as error:
            raise ContenderError(f"{python}: cannot be run ({error.strerror})") from error
        finally:
            other.close()

    def open(self, job: Job) -> None:
        """Make the pipeline, check its batches and warm it up. Raises ContenderError."""
        order = {"open": self.contender.function, "job": job, "packages": self.contender.packages, "warm": WARM}
        self.versions = self.ask(order, OPENING)["versions"]

    def run(self, seconds: float) -> tuple[float, float]:
        """Images per second and CPU milliseconds per image, measured for about `seconds`. Raises ContenderError."""
        found = self.ask({"run": seconds, "ahead": self.contender.ahead}, seconds + PATIENCE)
        return found["images"] / found["seconds"], found["cpu_seconds"] / found["images"] * 1e3

    def ask(self, order: dict[str, Any], timeout: float) -> dict[str, Any]:
        """Send an order; returns the answer. timeout: seconds."""
        try:
            self._connection.send_bytes(json.dumps(order).encode())
            if not self._connection.poll(timeout):
                raise ContenderError(f"hangs: no answer within {timeout:.0f} s")
            answer: dict[str, Any] = json.loads(self._connection.recv_bytes())
        except (EOFError, OSError) as error:
            raise ContenderError(f"its process died: {self._last_line()}") from error
        if "missing" in answer:
            raise ContenderError(f"not installed: {self.contender.install} ({answer['missing']})")
        if "error" in answer:
            raise ContenderError(answer["error"])
        return answer

    def close(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._connection.close()
        self._log.close()

    def _last_line(self) -> str:
        """The last line that the process printed, or its exit code if it printed none."""
        code = self._process.wait(10)
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit code {code}"
