"""Shared by all checks: their options, the lines of the output, probes in a child process, and reading of /proc and /sys."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import install_command

PACKAGE = Path(__file__).resolve().parents[1]  # the library's folder: pipeline/ in a checkout, else cropfeed/
PACKAGES = install_command()
PROBE_S = 120  # seconds after which a probe counts as hanging; with a broken GPU, imports can hang

Status = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Line:
    """One line of the output. remedy: an exact command or one sentence; empty if nothing is wrong."""

    status: Status
    name: str
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class DoctorOptions:
    """root: the folder of proc, sys and dev; tests use another one than /. data, cache, cache_gb: as in a LoaderSpec."""

    root: Path = Path("/")
    data: str | None = None
    cache: Path | None = None
    cache_gb: float | None = None


def probe(code: str, **environment: str) -> tuple[Any, str]:
    """Run `code` in a child process. Returns the JSON on the last line of its output, and "" or an error message.

    A child process, because a package that was built for another machine may crash the process or print to its streams.
    """
    try:
        child = subprocess.run(
            [sys.executable, "-c", code],
            cwd=PACKAGE.parent, env={**os.environ, **environment}, capture_output=True, text=True, timeout=PROBE_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None, f"did not end within {PROBE_S} s"
    if child.returncode < 0:
        return None, f"crashed with {signal.Signals(-child.returncode).name}"
    if child.returncode:
        lines = [line.strip() for line in child.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]  # more output may follow the error
        return None, (errors or lines)[-1]
    return json.loads(child.stdout.splitlines()[-1]), ""


def has_gpu(root: Path) -> bool:
    """Whether an NVIDIA GPU is accessible on this machine or in this container."""
    return any((root / "dev").glob("nvidia[0-9]*"))
