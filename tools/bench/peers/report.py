"""The comparison's figures: as rows of tools/bench/results/compare.csv, as a table, and as the content of a JSON file.

The JSON is {"compared", "rows", "bytes_touched"}. compared: the options, as text. bytes_touched: see the function; null without
`lossless` shards. rows: one for each contender, with these fields, which are null if they do not apply:

    name, data                 the contender, and original, 500, lossless or compact
    images_per_s, low, high    median, minimum and maximum over the repeats
    kb_per_image               size of the files that hold its images, 1,000 bytes
    cpu_ms_per_image           user and system time of the process tree, median
    ratio                      throughput over that of the fastest peer on the same data (see compare.py), median
    cpu_over_decode            CPU time over that of decoding the same cuts alone, median; for Cropfeed on lossless and compact
    versions                   of the contender's packages
    error                      why the contender could not be measured
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
COLUMNS = f"{'':30}{'images/s':>9}  {'low to high':15}{'kB/image':>9}{'CPU ms':>8}{'× fastest peer':>16}{'× decoding':>12}"
TITLES = {
    "original": "original files, and Cropfeed's shards of them",
    "500": "longest side 500, quality 90, 4:2:0, and Cropfeed's compact shards",
}


@dataclass(frozen=True)
class Row:
    """One contender's figures, with one value per repeat. They are empty if the contender failed or the figure does not apply."""

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
            "kb_per_image": result.kb_per_image,
            "cpu_ms_per_image": middle(result.cpu_ms if rates else []),
            "ratio": middle(self.ratios),
            "cpu_over_decode": middle(self.cpu_over_decode),
            "versions": result.versions,
            "error": result.error,
        }

    def figures(self) -> Iterator[Figure]:
        """The figures for the CSV file."""
        if self.result.error is None:
            yield Figure("images_per_s", self.result.images_per_s)
            yield Figure("cpu_ms_per_image", self.result.cpu_ms)
            yield Figure("kb_per_image", [self.result.kb_per_image or 0.0])
        if self.ratios:
            yield Figure("ratio_to_fastest_peer", self.ratios)
        if self.cpu_over_decode:
            yield Figure("cpu_over_decode_of_the_cut", self.cpu_over_decode)


def middle(values: list[float]) -> float | None:
    return median(values) if values else None


def figures(results: list[Result]) -> list[Row]:
    """The contenders' rows. Ratios are taken within each repeat."""
    measured = [result for result in results if result.error is None]
    rows = []
    for result in results:
        ratios: list[float] = []
        over_decode: list[float] = []
        if result in measured and result.contender.kind != "decode":
            others = [other for other in measured if other.contender.group == result.contender.group]
            kinds = ([other for other in others if other.contender.kind == kind] for kind in ("peer", "raw"))
            if rivals := next(filter(None, kinds), None):
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
    """Bytes read for a crop over the bytes of the image, for the cut itself and for the pages read into a cold page cache.

    Returns name -> mean of the ratios over the images, and ratio of the sums.
    """
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
    """Append the measured rows."""
    with redirect_stdout(None):  # `record` prints the rows, which the table shows anyway
        for row in rows:
            contender = row.result.contender
            if found := list(row.figures()):
                of = f"{contender.data}: {spec}; {row.result.versions}"
                record(file, "compare", *found, engine=contender.name, spec=of, cache=CACHE)
        for name, ratios in bytes_touched(touched).items() if touched else ():
            found = [Figure(f"{kind}_to_image", [value]) for kind, value in ratios.items()]
            record(file, "bytes touched", *found, engine=name, spec=f"lossless: {spec}", cache="cold")


def content(rows: list[Row], touched: Touched | None, spec: str) -> dict[str, Any]:
    """The content of a JSON file."""
    return {
        "compared": spec,
        "rows": [row.summary() for row in rows],
        "bytes_touched": bytes_touched(touched) if touched else None,
    }


def table(rows: list[Row], touched: Touched | None) -> str:
    """Text for a terminal: the fastest contenders first, and those that failed last, with the reason."""
    lines = []
    for group, title in TITLES.items():
        summaries = [row.summary() for row in rows if row.result.contender.group == group]
        if summaries:
            summaries.sort(key=lambda row: -(row["images_per_s"] or 0.0))
            lines += [title, COLUMNS, *map(line, summaries), ""]
    for name, ratios in bytes_touched(touched).items() if touched else ():
        lines.append(f"bytes read over the image's, {name}: {ratios['mean']:.3f} (ratio of sums {ratios['ratio_of_sums']:.3f})")
    return "\n".join(lines)


def line(row: dict[str, Any]) -> str:
    """A line of the table, under COLUMNS."""
    if row["error"] is not None:
        return f"  {row['name']:28} {row['error']}"
    spread = f"[{row['low']:.0f} to {row['high']:.0f}]"
    ratio, over = (f"{row[name]:.2f}" if row[name] is not None else "" for name in ("ratio", "cpu_over_decode"))
    rates = f"{row['images_per_s']:>9.0f}  {spread:15}{row['kb_per_image']:>9.0f}{row['cpu_ms_per_image']:>8.2f}"
    return f"  {row['name']:28}{rates}{ratio:>16}{over:>12}"
