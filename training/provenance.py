"""The provenance of a result: the commit, versions, hardware and environment variables of its run."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "nvidia-dali-cuda130", "ffcv", "numba", "accelerate", "pillow", "numpy")
# Environment variables that affect what a run does or how fast. None of them may hold a secret.
VARIABLES = re.compile(r"(ACCELERATE|CROPFEED|CUDA|NCCL|GLOO|OMP|MKL|KMP|PYTORCH|TORCH|TORCHELASTIC|SLURM)_|(LOCAL_)?WORLD_SIZE$")
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)


def hardware() -> str:
    """Processor, usable cores and GPU, in one line."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text("utf-8").splitlines() if line.startswith("model name")
        ]
        name = models[0] if models else name
    gpu = f", {torch.cuda.device_count()} x {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{len(os.sched_getaffinity(0))} cores of {name}{gpu}"


@cache
def commit() -> str:
    """The checkout's commit, with a + if tracked files have changed. A copy without git has that of $CROPFEED_COMMIT, or
    "unknown". Cached at the first call, so that results which a program then writes to a tracked file do not count as a change.
    """
    if given := os.environ.get("CROPFEED_COMMIT"):
        return given
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except OSError:  # git is not installed
        return "unknown"
    return found.stdout.strip() or "unknown"


@cache
def versions() -> str:
    """The versions of Python and of PACKAGES, in one line."""
    found = [f"python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def origin() -> dict[str, str]:
    """Day, commit, command, hardware and versions of a measurement by this process."""
    command = " ".join(["python", *sys.argv])
    day = datetime.now(UTC).strftime("%Y-%m-%d")
    return {"date": day, "commit": commit(), "command": command, "hardware": hardware(), "versions": versions()}


def environment() -> dict[str, str]:
    """The environment variables that affect a run, without secrets."""
    return {name: value for name, value in sorted(os.environ.items()) if VARIABLES.match(name) and not SECRET.search(name)}
