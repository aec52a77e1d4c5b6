"""Rows of tools/bench/results/*.csv: every figure with what it takes to believe it. README tables come from these rows alone."""

from __future__ import annotations

import csv
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import _path  # noqa: F401

from training.provenance import commit, hardware, versions

COLUMNS = (
    "date", "commit", "command", "hardware", "versions", "benchmark", "engine", "spec", "cache", "metric", "value", "low", "high",
    "repeats",
)  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """One measured quantity: its median, lowest and highest over the repeats."""

    metric: str
    values: list[float]

    def __str__(self) -> str:
        middle, low, high = (f"{value:.4g}" for value in (median(self.values), min(self.values), max(self.values)))
        return f"{self.metric} {middle} [{low} to {high}] over {len(self.values)} runs"


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
