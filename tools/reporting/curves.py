"""The curves of several runs in one chart, as SVG with colours from the page's style.

The colours given to matplotlib are placeholders: INK becomes var(--ink), and so on, so that one SVG serves light and dark pages.
Runs have the colours of Okabe and Ito 2008 that are visible on white; people with colour blindness can distinguish them. From the
seventh run on, the colours repeat with dashed lines.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tools.reporting.runs import Floats, Run, time_weights

# (on a light page, on a dark page)
COLOURS = (
    ("#0072b2", "#4ba6e0"),
    ("#d55e00", "#f2803a"),
    ("#009e73", "#22bd90"),
    ("#cc79a7", "#dd94bb"),
    ("#56b4e9", "#8accf2"),
    ("#e69f00", "#f0b73c"),
)
DASHES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
INK, GREY, LINE = "#1f2933", "#5c6770", "#e3e7ea"
MAX_POINTS = 150  # of a curve; longer ones are averaged over neighbouring rows
WIDTH, HEIGHT = 4.7, 2.75  # inches: small, so that the text is legible on a phone
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "cropfeed",  # deterministic ids
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
}


class Chart(NamedTuple):
    """x, y: columns of metrics.csv. x_unit: divisor of the x column. percent: show y in percent. pale: a second column, drawn as
    a thin, pale line. timed: when rows are averaged, they are weighted by their duration."""

    title: str
    x: str
    y: str
    label: str
    x_unit: float = 1
    percent: bool = False
    pale: str = ""
    timed: bool = False


CHARTS = (
    Chart("Training loss", "epoch", "train_loss", "epoch"),
    Chart("Top-1, % (pale: training)", "epoch", "val_top1", "epoch", percent=True, pale="train_top1"),
    Chart("Top-1, % (pale: training)", "seconds", "val_top1", "minutes", x_unit=60, percent=True, pale="train_top1"),
    Chart("Learning rate", "epoch", "lr", "epoch"),
    Chart("Images per second", "epoch", "images_per_s", "epoch", timed=True),
    Chart("Data wait, % of the time", "epoch", "wait_share", "epoch", percent=True, timed=True),
)


def draw(runs: Sequence[Run]) -> list[tuple[Chart, str]]:
    """The charts for which at least one run has points, as <svg> elements."""
    charts = [
        chart for chart in CHARTS if any(len(run.series(chart.x, y)[0]) for run in runs for y in (chart.y, chart.pale) if y)
    ]
    with rc_context(STYLE):
        return [(chart, svg(figure_of(chart, runs), f"c{number}")) for number, chart in enumerate(charts)]


def colour(place: int) -> str:
    """The colour of the run at this position in the list, as a variable of the page's style."""
    return f"var(--run-{place % len(COLOURS)})"


def figure_of(chart: Chart, runs: Sequence[Run]) -> Figure:
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.add_subplot()
    for place, run in enumerate(runs):
        stroke = COLOURS[place % len(COLOURS)][0]
        dashes = DASHES[place // len(COLOURS) % len(DASHES)]
        if chart.pale:
            axes.plot(*points(run, chart, chart.pale), color=stroke, ls=dashes, lw=0.9, alpha=0.45, zorder=2)
        rare = chart.y.startswith("val_")
        marker = "o" if rare and len(run.series(chart.x, chart.y)[0]) <= 30 else ""
        axes.plot(*points(run, chart, chart.y), color=stroke, ls=dashes, lw=1.7, marker=marker, ms=3.5, zorder=3)
    finish(axes, chart)
    if chart.y == "wait_share":
        axes.set_ylim(0, data_wait_limit(runs))
    return figure


def finish(axes: Axes, chart: Chart) -> None:
    axes.set_xlabel(chart.label)
    axes.set_xlim(0, None)
    axes.set_ylim(0, None)
    axes.tick_params(length=0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.grid(color=LINE, lw=0.6)
    axes.set_axisbelow(True)


def data_wait_limit(runs: Sequence[Run]) -> float:
    """The top of the axis, percent. A run's first row is left out: it includes the loader's start and may be far higher."""
    later = [float(waits[1:].max()) for run in runs if len(waits := run.series("epoch", "wait_share")[1]) > 1]
    return 110 * max(0.05, *later, 0)


def points(run: Run, chart: Chart, y: str) -> tuple[Floats, Floats]:
    """A curve in the chart's units, of at most MAX_POINTS points."""
    x_values, y_values = run.series(chart.x, y)
    weights = time_weights(run)[np.isfinite(run.columns[chart.x]) & np.isfinite(run.columns[y])] if chart.timed else None
    return thinned(x_values / chart.x_unit, 100 * y_values if chart.percent else y_values, weights)


def thinned(x: Floats, y: Floats, weights: Floats | None = None) -> tuple[Floats, Floats]:
    """At most MAX_POINTS points: weighted means of neighbours."""
    if len(x) <= MAX_POINTS:
        return x, y
    if weights is None:
        weights = np.ones_like(x)
    starts = np.arange(0, len(x), -(-len(x) // MAX_POINTS))
    total = np.add.reduceat(weights, starts)
    return np.add.reduceat(weights * x, starts) / total, np.add.reduceat(weights * y, starts) / total


def svg(figure: Figure, prefix: str) -> str:
    """The figure as an element for an HTML page. prefix: makes its ids unique in the page."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.S)  # the style would apply to the whole page
    text = re.sub(r' (xmlns(:\w+)?|version|width|height)="[^"]*"', "", text[: text.index(">")]) + text[text.index(">") :]
    text = text.replace("xlink:href=", "href=")
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
    for number, (light, _) in enumerate(COLOURS):
        text = text.replace(light, f"var(--run-{number})")
    for name, value in (("ink", INK), ("grey", GREY), ("line", LINE)):
        text = text.replace(value, f"var(--{name})")
    return text.strip()
