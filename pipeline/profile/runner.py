"""Starts the process of a loader, sends it orders, pauses it while another one is measured, and ends it with all its children."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from contextlib import suppress
from typing import Any

from ..errors import UserError
from . import processes

PATIENCE = 60.0  # seconds that a turn may take beyond its duration
_CODE = "import sys; sys.path[:] = {path!r} or sys.path; from {package}.worker import main; main({descriptor})"


class Runner:
    """A loader in a process and session of its own, so that its errors, threads and children are kept apart from ours.

    name: what messages call it. The process is paused except while it executes an order. Its output goes to stderr.
    """

    def __init__(self, name: str, python: str | None = None, **options: Any) -> None:
        """python: another interpreter than ours, with the packages that it has. options: for Popen."""
        self.name = name
        self.memory = self.peak = 0  # bytes, see `processes.memory`
        self._connection, other = multiprocessing.Pipe()
        code = _CODE.format(path=[] if python else sys.path, package=__package__, descriptor=other.fileno())
        self.process = subprocess.Popen(
            [python or sys.executable, "-c", code],
            pass_fds=[other.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            **{"stdout": 2} | options,
        )
        other.close()
        # If we are killed, this ends the process, which may be paused.
        guard = ["sh", "-c", f"cat > /dev/null; kill -KILL -{self.process.pid}"]
        self._guard = subprocess.Popen(guard, stdin=subprocess.PIPE, start_new_session=True)

    def ask(self, *order: Any, timeout: float) -> Any:
        """Send an order, and return the answer. timeout: seconds. Raises UserError."""
        self._signal(signal.SIGCONT)
        try:
            self._connection.send(order)
            if not self._connection.poll(timeout):
                raise UserError(f"{self.name}: no batch within {timeout:.0f} s", "does it hang? See how far it comes on its own")
            answer = self._connection.recv()
        except (EOFError, ConnectionError) as error:
            raise UserError(f"{self.name}: its process ended, {self._end()}", "run it on its own to see why") from error
        if isinstance(answer, UserError):
            raise answer
        self._signal(signal.SIGSTOP)
        now, peak = processes.memory(self.process.pid)
        self.memory, self.peak = max(self.memory, now), max(self.peak, peak)
        return answer

    def close(self) -> None:
        """End the process and its children."""
        self._guard.kill()
        self._guard.communicate()
        self._signal(signal.SIGKILL)
        self.process.wait()
        self._connection.close()

    def _signal(self, number: int) -> None:
        """Signal the process and its descendants, of which some may have a process group of their own."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)
        for process in processes.family(self.process.pid):
            with suppress(ProcessLookupError, PermissionError):
                os.kill(process, number)

    def _end(self) -> str:
        code = self.process.wait(10)
        if code >= 0:
            return f"exit code {code}"
        full = "; the memory may be full" if code == -signal.SIGKILL else ""
        return f"killed by {signal.Signals(-code).name}{full}"
