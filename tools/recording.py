"""Rows of tools/results/*.csv: every figure with what it takes to believe it. README tables come from these rows alone."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import _path
import torch

COLUMNS = (
    "date", "commit", "command", "hardware", "versions", "benchmark", "engine", "spec", "cache", "metric", "value", "low", "high",
    "repeats",
)  # fmt: skip
PACKAGES = ("torch", "nvidia-dali-cuda130", "numba", "accelerate", "pillow", "numpy")


@dataclass(frozen=True)
class Figure:
    """One measured quantity: its median, lowest and highest over the repeats."""

    metric: str
    values: list[float]

    def __str__(self) -> str:
        middle, low, high = (f"{value:.4g}" for value in (median(self.values), min(self.values), max(self.values)))
        return f"{self.metric} {middle} [{low} to {high}] over {len(self.values)} runs"


def hardware() -> str:
    """Processor, usable cores and GPU, in one line."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = models[0] if models else name
    gpu = f", {torch.cuda.device_count()} x {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{len(os.sched_getaffinity(0))} cores of {name}{gpu}"


def commit() -> str:
    """The checkout's commit, with + where tracked files have changed since; "unknown" outside git."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--exclude=*"], cwd=_path.ROOT, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


def versions() -> str:
    found = [f"python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def record(file: Path, benchmark: str, figure: Figure, *, engine: str, spec: str, cache: str, command: str | None = None) -> None:
    """Append a row to `file` and print it. cache: state of the page cache; command: what was run, if not this process."""
    row = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit(),
        "command": command or " ".join(["python", *sys.argv]),
        "hardware": hardware(),
        "versions": versions(),
        "benchmark": benchmark,
        "engine": engine,
        "spec": spec,
        "cache": cache,
        "metric": figure.metric,
        "value": f"{median(figure.values):.6g}",
        "low": f"{min(figure.values):.6g}",
        "high": f"{max(figure.values):.6g}",
        "repeats": len(figure.values),
    }
    new = not file.exists()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow(row)
    print(f"{benchmark} ({engine}; {spec}): {figure}", flush=True)
