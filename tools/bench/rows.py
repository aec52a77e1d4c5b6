"""For tables.py: rows of tools/bench/results/*.csv, which recording.py wrote, and a Markdown table of some of them."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import UserError
from tools.bench.labels import tidy

Row = dict[str, str]


class Pair(NamedTuple):
    """Rows of accuracy.csv: Cropfeed's, a baseline's, and the ratios of their times, in a training with the same seeds."""

    training: str
    baseline: str
    seeds: list[str]
    conditions: str  # seeds, cores, what else ran
    own: list[Row]
    other: list[Row]
    ratios: list[Row]


def read(results: Path, name: str) -> list[Row]:
    """The rows of results/NAME.csv, with `kind`: the first word of the spec, such as the kind of images or shards."""
    with (results / f"{name}.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    return [row | {"kind": re.split(r"\W", row.get("spec", ""), maxsplit=1)[0]} for row in rows]


def runs(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows by run, the newest run last. The first rows of a run may lack the + that the others' commit has."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault((row["date"], row["commit"].rstrip("+"), row["command"]), []).append(row)
    return sorted(found.values(), key=lambda run: run[0]["date"])


def pick(rows: Sequence[Row], **columns: str) -> Row | None:
    """The last of the rows with these values."""
    return next((row for row in reversed(rows) if all(row[name] == value for name, value in columns.items())), None)


def show(row: Row | None, style: str = "{:,.0f}", column: str = "value", factor: float = 1) -> str:
    return style.format(factor * float(row[column])) if row else ""


def spread(row: Row | None, style: str = "{:.2f}") -> str:
    return show(row, f" ({style} to ", "low") + show(row, f"{style})", "high")


def conditions(row: Row) -> str:
    """The spec without the kind of images and the versions."""
    return tidy(re.sub(rf"^{row['kind']}[:,] ", "", row["spec"]).split("; ")[0])


def newest(results: Path, name: str, benchmark: str | None = None) -> list[Row]:
    """The rows of this benchmark, or all, of the newest run in results/NAME.csv that has any. Raises UserError without rows."""
    found = runs(row for row in read(results, name) if benchmark in (None, row["benchmark"]))
    if not found:
        raise UserError(f"{results / name}.csv: has no rows{f' of {benchmark}' if benchmark else ''}")
    return found[-1]


def pairs(results: Path) -> list[Pair]:
    """Cropfeed against each baseline in each training: the comparison of the most seeds, and the newest of these. Newest last."""
    values = read(results, "accuracy")
    by_key: dict[tuple[str, str, str], list[Row]] = {}  # training, seeds, contender
    found: dict[tuple[str, str], Pair] = {}
    for run in read(results, "accuracy_runs"):
        training, given = re.findall(r": ([^:]*), batch \d+; (seeds .*)", run["spec"])[0]
        seeds, _, _ = given.partition(";")
        rows = by_key[training, seeds, run["engine"]] = [run | row for row in values if row["run"] == run["id"]]
        contender, _, baseline = run["engine"].partition(" / ")
        best = found.get((training, baseline))
        if baseline and (best is None or len(seeds.split()[1:]) >= len(best.seeds)):
            own, other = by_key[training, seeds, contender], by_key[training, seeds, baseline]
            found.pop((training, baseline), None)
            given = re.sub(r"^seeds (\d+);", r"seed \1;", given).replace("1 cores", "1 core")
            found[training, baseline] = Pair(training, baseline, seeds.split()[1:], given, own, other, rows)
    return list(found.values())


def table(head: Sequence[str], lines: Iterable[Sequence[str]], rows: Iterable[Row], note: str = "") -> list[str]:
    """Markdown: the table, and below it where the rows come from. note: what else the reader must know."""
    origins: dict[tuple[str, ...], str] = {}  # date, commit and hardware, in words
    caches: dict[tuple[str, ...], dict[str, None]] = {}
    for row in rows:
        cores = re.sub(r"^1 cores", "1 core", row["hardware"].replace("(R)", "")).removesuffix(" Processor")
        key = row["date"], row["commit"].rstrip("+"), cores
        commit = row["commit"].replace("+", " with local changes")
        origins.setdefault(key, f"{row['date']}, commit {commit}, {cores}")
        caches.setdefault(key, {})[row["cache"]] = None
    cells = [head, ["---"] * len(head), *lines]
    body = [re.sub(" +", " ", f"| {' | '.join(line)} |") for line in cells]
    measured = (f"{origin}, page cache {' and '.join(caches[key])}" for key, origin in origins.items())
    return [*body, "", f"{note + '. ' if note else ''}Measured: {'; '.join(measured)}."]
