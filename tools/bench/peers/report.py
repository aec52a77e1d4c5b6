"""The comparison's figures: as rows of tools/bench/results/compare.csv, and as a table."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from tools.bench.peers.cuts import Touched
from tools.bench.peers.turns import Result
from tools.bench.recording import Figure, ratios, record

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

    def __str__(self) -> str:
        """A line of the table, under COLUMNS."""
        result = self.result
        if result.error is not None:
            return f"  {result.contender.name:28} {result.error}"
        rates = result.images_per_s
        spread = f"[{min(rates):.0f} to {max(rates):.0f}]"
        own = f"{median(rates):>9.0f}  {spread:15}{result.kb_per_image or 0:>9.0f}{median(result.cpu_ms):>8.2f}"
        ratio, over = (f"{median(values):.2f}" if values else "" for values in (self.ratios, self.cpu_over_decode))
        return f"  {result.contender.name:28}{own}{ratio:>16}{over:>12}"


def figures(results: list[Result]) -> list[Row]:
    """The contenders' rows. Ratios are taken within each repeat."""
    measured = [result for result in results if result.error is None]
    rows = []
    for result in results:
        to_fastest: list[float] = []
        over_decode: list[float] = []
        if result in measured and result.contender.kind != "decode":
            others = [other for other in measured if other.contender.group == result.contender.group]
            kinds = ([other for other in others if other.contender.kind == kind] for kind in ("peer", "raw"))
            if rivals := next(filter(None, kinds), None):
                fastest = max(rivals, key=lambda peer: median(peer.images_per_s))
                to_fastest = ratios(result.images_per_s, fastest.images_per_s)
            for other in measured:
                if other.contender.kind == "decode" and other.contender.data == result.contender.data:
                    over_decode = ratios(result.cpu_ms, other.cpu_ms)
        rows.append(Row(result, to_fastest, over_decode))
    return rows


def bytes_touched(touched: Touched) -> dict[str, float]:
    """Bytes read for a crop over the image's, for the cut itself and for the pages read into a cold page cache: name -> the mean
    over the images."""
    kinds = {"cut": touched.needed, "cold page cache, madvise random": touched.loaded}
    return {name: float(np.mean(count / touched.stored)) for name, count in kinds.items() if count is not None}


def write_csv(file: Path, rows: list[Row], touched: Touched | None, spec: str) -> None:
    """Append the measured rows."""
    with redirect_stdout(None):  # `record` prints the rows, which the table shows anyway
        for row in rows:
            contender = row.result.contender
            if found := list(row.figures()):
                of = f"{contender.data}: {spec}; {row.result.versions}"
                record(file, "compare", *found, engine=contender.name, spec=of)
        for name, value in bytes_touched(touched).items() if touched else ():
            figure = Figure("mean_to_image", [value])
            record(file, "bytes touched", figure, engine=name, spec=f"lossless: {spec}", cache="cold")


def table(rows: list[Row], touched: Touched | None) -> str:
    """Text for a terminal: the fastest contenders first, and those that failed last, with the reason."""
    lines = []
    for group, title in TITLES.items():
        own = [row for row in rows if row.result.contender.group == group]
        own.sort(key=lambda row: (row.result.error is not None, -median(row.result.images_per_s or [0])))
        if own:
            lines += [title, COLUMNS, *map(str, own), ""]
    for name, value in bytes_touched(touched).items() if touched else ():
        lines.append(f"bytes read over the image's, {name}: {value:.3f}")
    return "\n".join(lines)
