"""Rows of tools/bench/results/*.csv: each figure with its command, commit, hardware and versions.

The tables of README and docs are generated from these rows alone.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tools import ROOT
from training.provenance import origin

RESULTS = ROOT / "tools" / "bench" / "results"  # the default folder of rows
ORIGIN = ("date", "commit", "command", "hardware", "versions", "benchmark", "engine", "spec", "cache")
VALUES = ("metric", "value", "low", "high", "repeats")
COLUMNS = (*ORIGIN, *VALUES)


@dataclass(frozen=True)
class Figure:
    """One measured quantity: a value for each repeat."""

    metric: str
    values: Sequence[float]

    def __str__(self) -> str:
        middle, low, high = self._spread(4)
        return f"{self.metric} {middle} [{low} to {high}] over {len(self.values)} runs"

    def row(self) -> dict[str, str]:
        """VALUES: the median, lowest and highest over the repeats."""
        return dict(zip(VALUES, (self.metric, *self._spread(6), str(len(self.values))), strict=True))

    def _spread(self, digits: int) -> list[str]:
        return [f"{value:.{digits}g}" for value in (median(self.values), min(self.values), max(self.values))]


def ratios(values: Iterable[float], others: Iterable[float]) -> list[float]:
    """Each value divided by the other one of the same repeat."""
    return [value / other for value, other in zip(values, others, strict=True)]


def record(
    file: Path,
    benchmark: str,
    *figures: Figure,
    engine: str,
    spec: str,
    cache: str = "warm",
    command: str | None = None,
    runs: Path | None = None,
) -> None:
    """Append a row for each figure to `file`, and print it.

    cache: state of the page cache. command: the command that was measured, by default that of this process. runs: a second file,
    which gets one row with the columns `id` and ORIGIN. The rows of `file` then have the column `run`, which is this id, and
    VALUES. Without `runs` they have COLUMNS.
    """
    row = origin() | ({"command": command} if command else {})
    row |= {"benchmark": benchmark, "engine": engine, "spec": spec, "cache": cache}
    if runs is not None:
        number = _rows(runs) + 1
        _append(runs, [{"id": str(number), **row}])
        row = {"run": str(number)}
    _append(file, [{**row, **figure.row()} for figure in figures])
    for figure in figures:
        print(f"{benchmark} ({engine}; {spec}): {figure}", flush=True)


def _rows(file: Path) -> int:
    if not file.exists():
        return 0
    with file.open(newline="") as stream:
        return sum(1 for _ in csv.DictReader(stream))


def _append(file: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """rows: at least one; all have the same columns."""
    new = not file.exists()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)
