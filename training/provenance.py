"""What it takes to believe a figure or to repeat a run: commit, versions, hardware and environment."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "nvidia-dali-cuda130", "ffcv", "numba", "accelerate", "pillow", "numpy")
# Variables that decide what a run does or how fast; none that holds a secret.
VARIABLES = re.compile(r"(ACCELERATE|CROPFEED|CUDA|NCCL|GLOO|OMP|MKL|KMP|PYTORCH|TORCH|TORCHELASTIC|SLURM)_|(LOCAL_)?WORLD_SIZE$")
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)


def hardware() -> str:
    """Processor, usable cores and GPU, in one line."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = models[0] if models else name
    gpu = f", {torch.cuda.device_count()} x {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{len(os.sched_getaffinity(0))} cores of {name}{gpu}"


@cache
def commit() -> str:
    """The checkout's commit, with + where tracked files have changed since; "unknown" outside git. As it was when first asked:
    rows that a program writes to a tracked file make no change of their own.
    """
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except OSError:  # no git here
        return "unknown"
    return found.stdout.strip() or "unknown"


@cache
def versions() -> str:
    found = [f"python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def environment() -> dict[str, str]:
    """The variables that decide what a run does, without secrets."""
    return {name: value for name, value in sorted(os.environ.items()) if VARIABLES.match(name) and not SECRET.search(name)}
