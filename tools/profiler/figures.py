"""Formatting of a profile's figures, the same in the terminal, the charts and the HTML report, and the tables of them.

Each function takes a figure in the unit of schema.json (images per second, milliseconds, shares in 0..1, bytes, factors) and
returns its text. None, which means not measured, becomes DASH.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

DASH = "–"
UNITS = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))


def three_digits(value: float) -> str:
    """Three significant digits, no exponent; from 100 on a whole number with separators: 0.00312, 8.20, 96.0, 4,009."""
    if not math.isfinite(value):
        return DASH
    if value == 0:
        return "0"
    rounded = float(f"{value:.3g}")  # 99.97 is 100, not 100.0
    if abs(rounded) >= 100:
        return f"{value:,.0f}"
    return f"{rounded:.{2 - math.floor(math.log10(abs(rounded)))}f}"


def speed(value: float | None) -> str:
    """Images per second."""
    return DASH if value is None else three_digits(value)


def interval(low: float | None, high: float | None) -> str:
    """An interval of images per second."""
    return DASH if low is None or high is None else f"{speed(low)} to {speed(high)}"


def milliseconds(value: float) -> str:
    return f"{three_digits(value)} ms"


def seconds(value: float) -> str:
    return f"{three_digits(value)} s"


def share(value: float | None) -> str:
    """A share in 0..1 as a percentage; from 10 % on a whole number."""
    if value is None:
        return DASH
    percent = 100 * value
    return f"{percent:.0f} %" if percent == 0 or percent >= 9.95 else f"{percent:.1f} %"


def gain(value: float | None) -> str:
    """A factor."""
    return DASH if value is None else f"{value:,.2f} ×" if value < 99.5 else f"{value:,.0f} ×"


def gain_interval(low: float | None, high: float | None) -> str:
    return DASH if low is None or high is None else f"{gain(low)} to {gain(high)}"


def size(value: float | None) -> str:
    """Bytes: 1.91 GB, 110 kB."""
    if value is None:
        return DASH
    for letter, unit in UNITS:
        if value >= 0.9995 * unit:
            return f"{three_digits(value / unit)} {letter}B"
    return f"{value:.0f} B"


def bytes_rate(value: float | None) -> str:
    """Bytes per second: 1.91 GB/s."""
    return DASH if value is None else f"{size(value)}/s"


def amount(value: float | None, unit: str) -> str:
    """A value with its unit: 2 cores, 13.4 cores."""
    if value is None:
        return DASH
    if unit in ("bytes", "bytes/s"):
        return size(value) + unit.removeprefix("bytes")
    number = f"{value:,.0f}" if value == round(value) else three_digits(value)
    return f"{number} {unit}".rstrip()


def count(number: int, thing: str) -> str:
    """1 thread, 2 threads."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def at_threads(stage: dict[str, Any], threads: int) -> dict[str, Any] | None:
    """A stage's figures at a number of threads, or at the nearest one measured; None if none was measured."""
    return min(stage["at"], key=lambda at: abs(at["threads"] - threads), default=None)


def loader_milliseconds(profile: dict[str, Any]) -> float:
    """The time of the whole loader, as configured, per image and thread."""
    return 1e3 * profile["spec"]["threads"] / profile["images_per_s"] if profile["images_per_s"] > 0 else math.inf


@dataclass(frozen=True)
class Row:
    """cells: one for each column, from the left; missing ones are empty. note: text after the cells, such as an error."""

    cells: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A table of figures. texts: the number of text columns, at the left; the other columns are numbers, aligned right."""

    title: str
    columns: tuple[str, ...]
    rows: list[Row]
    texts: int = 1
    notes: list[str] = field(default_factory=list)

    def without_empty_columns(self) -> Section:
        """The same without the columns of figures that are empty in all rows."""
        full = [
            index
            for index in range(len(self.columns))
            if index < self.texts or any(row.cells[index : index + 1] not in ((), (DASH,), ("",)) for row in self.rows)
        ]
        rows = [Row(tuple(row.cells[i] for i in full if i < len(row.cells)), row.note) for row in self.rows]
        return Section(self.title, tuple(self.columns[i] for i in full), rows, self.texts, self.notes)
