"""A check's lines, what it is asked, and how it looks: in a Python of its own, and at what the kernel tells."""

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

PACKAGE = Path(__file__).resolve().parents[1]  # the library's folder: pipeline/ in a checkout, else cropfeed/
ROOT = PACKAGE.parent
IN_CHECKOUT = (ROOT / "constraints.txt").exists()
CONSTRAINT = "--constraint constraints.txt " if IN_CHECKOUT else ""


def install(extra: str = "") -> str:
    """The command that installs Cropfeed, with an extra."""
    extra = f"[{extra}]" if extra else ""
    return f"pip install {CONSTRAINT}-e '.{extra}'" if IN_CHECKOUT else f"pip install 'cropfeed{extra}'"


PACKAGES = install()
PROBE_S = 120  # until an import counts as hanging, as on a broken GPU

Status = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Line:
    """remedy: an exact command or one sentence; empty where all is well."""

    status: Status
    name: str
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Asked:
    """root: the folder whose proc, sys and dev are read, another machine's in tests. data, cache, cache_gb: as for train.py."""

    root: Path = Path("/")
    data: str | None = None
    cache: Path | None = None
    cache_gb: float | None = None


def probe(code: str, **environment: str) -> tuple[Any, str]:
    """Run `code` in a child process: the JSON on its last line, and "" or what went wrong.

    A package's build that does not fit the machine may crash its process or print to its streams.
    """
    try:
        child = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=PROBE_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None, f"did not end within {PROBE_S} s"
    if child.returncode < 0:
        return None, f"crashed with {signal.Signals(-child.returncode).name}"
    if child.returncode:
        lines = [line.strip() for line in child.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]  # more may be printed behind it
        return None, (errors or lines)[-1]
    return json.loads(child.stdout.splitlines()[-1]), ""


def read(path: Path) -> str:
    """A file of /proc or /sys; "" where this kernel has none."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def has_gpu(root: Path) -> bool:
    """Whether there is an NVIDIA GPU that this machine, or container, may open."""
    return any((root / "dev").glob("nvidia[0-9]*"))
