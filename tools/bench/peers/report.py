"""The comparison's figures: rows of tools/bench/results/compare.csv, what a JSON file holds of them, a table.

That is {"compared", "rows", "bytes_touched"}: compared says in words what was asked for. A row: name; data (original, 500,
lossless, compact); images_per_s, the median of the repeats, with its low and high; cpu_ms_per_image, user and system time over
the process tree, median; ratio to the fastest peer on the same data, median; cpu_over_decode, CPU time over that of decoding the
same cuts alone, median, for ours on lossless and compact; versions; error, why it was not measured. What does not apply is null.
bytes_touched (null without `lossless`): name -> mean over the images and ratio of the sums, see `bytes_touched`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from tools.bench.peers.cuts import Touched
from tools.bench.peers.turns import Result
from tools.bench.recording import Figure, record

CACHE = "warm"
COLUMNS = f"{'':30}{'images/s':>9}  {'low to high':15}{'CPU ms':>8}{'× fastest peer':>16}{'× decoding':>12}"
TITLES = {
    "original": "original files, and our shards of them",
    "500": "longest side 500, quality 90, 4:2:0, and our compact shards",
}


@dataclass(frozen=True)
class Row:
    """One contender's figures, each with a value a repeat; empty where it failed, or where they do not apply."""

    result: Result
    ratios: list[float]  # to the fastest peer on the same data
    cpu_over_decode: list[float]  # CPU time over that of decoding the same cuts alone

    def summary(self) -> dict[str, Any]:
        """The row of the JSON file."""
        result = self.result
        rates = result.images_per_s if result.error is None else []
        return {
            "name": result.contender.name,
            "data": result.contender.data,
            "images_per_s": middle(rates),
            "low": min(rates, default=None),
            "high": max(rates, default=None),
            "cpu_ms_per_image": middle(result.cpu_ms if rates else []),
            "ratio": middle(self.ratios),
            "cpu_over_decode": middle(self.cpu_over_decode),
            "versions": result.versions,
            "error": result.error,
        }

    def figures(self) -> Iterator[Figure]:
        """What goes into the CSV file."""
        if self.result.error is None:
            yield Figure("images_per_s", self.result.images_per_s)
            yield Figure("cpu_ms_per_image", self.result.cpu_ms)
        if self.ratios:
            yield Figure("ratio_to_fastest_peer", self.ratios)
        if self.cpu_over_decode:
            yield Figure("cpu_over_decode_of_the_cut", self.cpu_over_decode)


def middle(values: list[float]) -> float | None:
    return median(values) if values else None


def figures(results: list[Result]) -> list[Row]:
    """The rows with their ratios, each taken inside a repeat."""
    measured = [result for result in results if result.error is None]
    peers = [result for result in measured if result.contender.kind == "peer"]
    rows = []
    for result in results:
        ratios: list[float] = []
        over_decode: list[float] = []
        if result in measured and result.contender.kind != "decode":
            rivals = [peer for peer in peers if peer.contender.group == result.contender.group]
            if rivals:
                fastest = max(rivals, key=lambda peer: median(peer.images_per_s))
                ratios = divided(result.images_per_s, fastest.images_per_s)
            for other in measured:
                if other.contender.kind == "decode" and other.contender.data == result.contender.data:
                    over_decode = divided(result.cpu_ms, other.cpu_ms)
        rows.append(Row(result, ratios, over_decode))
    return rows


def divided(values: list[float], by: list[float]) -> list[float]:
    return [a / b for a, b in zip(values, by, strict=True)]


def bytes_touched(touched: Touched) -> dict[str, dict[str, float]]:
    """Bytes of what a crop reads over the image's: of the cut itself, and in the pages that a cold page cache loads for it."""
    kinds = {
        "cut": touched.needed,
        f"cold page cache, reading {touched.read_ahead} ahead": touched.loaded,
        "cold page cache, madvise random": touched.loaded_randomly,
    }
    return {
        name: {"mean": float(np.mean(count / touched.stored)), "ratio_of_sums": float(count.sum() / touched.stored.sum())}
        for name, count in kinds.items()
        if count is not None
    }


def write_csv(file: Path, rows: list[Row], touched: Touched | None, spec: str) -> None:
    """Append the measured rows. `record` also prints them, which the table does better."""
    with redirect_stdout(None):
        for row in rows:
            contender = row.result.contender
            for figure in row.figures():
                of = f"{contender.data}: {spec}; {row.result.versions}"
                record(file, "compare", figure, engine=contender.name, spec=of, cache=CACHE)
        for name, ratios in bytes_touched(touched).items() if touched else ():
            for kind, value in ratios.items():
                figure = Figure(f"{kind}_to_image", [value])
                record(file, "bytes touched", figure, engine=name, spec=f"lossless: {spec}", cache="cold")


def content(rows: list[Row], touched: Touched | None, spec: str) -> dict[str, Any]:
    """What a JSON file is to hold."""
    return {
        "compared": spec,
        "rows": [row.summary() for row in rows],
        "bytes_touched": bytes_touched(touched) if touched else None,
    }


def table(rows: list[Row], touched: Touched | None) -> str:
    """The fastest first, those not measured last, each with its reason."""
    lines = []
    for group, title in TITLES.items():
        summaries = [row.summary() for row in rows if row.result.contender.group == group]
        if summaries:
            summaries.sort(key=lambda row: -(row["images_per_s"] or 0.0))
            lines += [title, COLUMNS, *map(line, summaries), ""]
    for name, ratios in bytes_touched(touched).items() if touched else ():
        lines.append(f"bytes touched over the image's, {name}: {ratios['mean']:.3f} (of the sums {ratios['ratio_of_sums']:.3f})")
    return "\n".join(lines)


def line(row: dict[str, Any]) -> str:
    """A line under COLUMNS."""
    if row["error"] is not None:
        return f"  {row['name']:28} {row['error']}"
    spread = f"[{row['low']:.0f} to {row['high']:.0f}]"
    ratio, over = (f"{row[name]:.2f}" if row[name] is not None else "" for name in ("ratio", "cpu_over_decode"))
    return f"  {row['name']:28}{row['images_per_s']:>9.0f}  {spread:15}{row['cpu_ms_per_image']:>8.2f}{ratio:>16}{over:>12}"
