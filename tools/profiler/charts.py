"""A profile's charts: `draw` returns {"stages", "threads", "timeline"} -> PNG bytes; without a demand there is no timeline.

In all charts, as in the report's header, work is blue, the bottleneck is red, and unused stages are grey. Figures are made
without pyplot, so there is no global state and nothing to close.
"""

from __future__ import annotations

import io
import math
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from tools.profiler.figures import at_threads, count, loader_milliseconds, milliseconds, seconds, share, speed

Profile = dict[str, Any]
INK, GREY, PALE = "#1f2933", "#6b7680", "#d5dade"
WORK, LIMIT = "#2f6690", "#c0392b"
SHADES = (WORK, "#4a7da6")
OTHERS = ("#b7791f", "#3b8070", "#7a5195", "#8c564b", "#5f6b75")  # engines other than the configured one
WIDTH, DPI = 6.25, 224  # inches and dots per inch: narrow, so that text is legible on a phone
LOG_FROM = 6  # the axis is logarithmic if the ratio of speeds exceeds this
STEPS_A_ROW, ROWS = 50, 6  # of the timeline
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": PALE,
    "axes.labelcolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "hatch.linewidth": 0.6,
}


def draw(profile: Profile) -> dict[str, bytes]:
    """The PNGs, 1400 pixels wide."""
    return {name: png(figure) for name, figure in figures(profile).items()}


def figures(profile: Profile) -> dict[str, Figure]:
    """The same as matplotlib figures."""
    with rc_context(STYLE):
        made = {"stages": stages(profile), "threads": threads(profile)}
        if profile["demand"] and profile["demand"]["steps"]:
            made["timeline"] = timeline(profile)
        return made


def png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    with rc_context(STYLE):
        figure.savefig(stream, format="png", dpi=DPI)
    return stream.getvalue()


def blank(height: float, title: str, subtitle: str, left: float, right: float) -> tuple[Figure, Axes]:
    """A figure with a title, a subtitle and empty axes. height: inches. left, right: margins of the axes, inches."""
    figure = Figure(figsize=(WIDTH, height))
    figure.text(0.15 / WIDTH, 1 - 0.14 / height, title, size=11, weight="bold", va="top")
    figure.text(0.15 / WIDTH, 1 - 0.42 / height, subtitle, size=8.5, color=GREY, va="top")
    bottom, top = 0.52 / height, 1 - 0.72 / height
    axes = figure.add_axes((left / WIDTH, bottom, 1 - (left + right) / WIDTH, top - bottom))
    axes.tick_params(length=0)
    return figure, axes


def stages(profile: Profile) -> Figure:
    """A waterfall chart of the stages' times per image and thread, in processing order, and the time of the whole loader."""
    whole, limit = loader_milliseconds(profile), profile["verdict"]["stage"]
    bars = [(stage, at_threads(stage, profile["spec"]["threads"])) for stage in profile["stages"]]
    known = [(stage["name"], stage["used"], at["ms_per_image"]) for stage, at in bars if at]
    total = sum(took for _, used, took in known if used)
    right = 1.22 * max(total, whole if math.isfinite(whole) else 0.0, 1e-6)
    some_unused = not all(used for _, used, _ in known)
    subtitle = f"Milliseconds of one thread per image, at {count(profile['spec']['threads'], 'thread')}."
    subtitle += " Hatched: not used." if some_unused else ""
    figure, axes = blank(1.5 + 0.3 * (len(known) + 1), stages_title(profile, known, whole), subtitle, 1.25, 0.35)
    reached = 0.0
    for place, (name, used, took) in enumerate(known):
        bar(axes, place, reached, took, right, LIMIT if name == limit else WORK, used)
        if used:
            axes.plot([reached + took] * 2, [place + 0.32, place + 1.0], color=PALE, lw=0.8, zorder=0)
            reached += took
    last = len(known) + 0.25
    if math.isfinite(whole):
        bar(axes, last, 0.0, whole, right, LIMIT if limit == "engine" else INK, True)
    axes.set(xlim=(0, right), ylim=(last + 0.6, -0.6))
    axes.set_yticks([*range(len(known)), last], [*(name for name, _, _ in known), "whole loader"])
    for label, (name, used, _) in zip(axes.get_yticklabels(), [*known, ("engine", True, whole)], strict=True):
        label.set(color=LIMIT if name == limit else INK if used else GREY, weight="bold" if name == limit else "normal")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    plain_numbers(axes.xaxis)
    axes.set_xlabel("ms")
    axes.grid(axis="x", color=PALE, lw=0.5)
    axes.set_axisbelow(True)
    return figure


def stages_title(profile: Profile, known: list[tuple[str, bool, float]], whole: float) -> str:
    limit = profile["verdict"]["stage"]
    took = next((took for name, _, took in known if name == limit), None)
    if took is not None:
        return f"The loader's slowest stage is {limit}: {milliseconds(took)} per image"
    if limit == "model":
        return f"The model is the bottleneck; the loader takes {milliseconds(whole)} per image"
    return f"The engine itself is the bottleneck: {milliseconds(whole)} per image"


def bar(axes: Axes, place: float, start: float, length: float, right: float, colour: str, used: bool) -> None:
    """A bar with its value. An unused stage's bar that exceeds the axes is cut off and marked by an arrow."""
    edge = 0.86 * right  # leaves space for the label
    cut = start + length > edge and not used
    shown = max(min(length, edge - start) if cut else length, 0.004 * right)
    hatched: Any = {"facecolor": "#f1f3f4", "edgecolor": "#a9b2b9", "hatch": "////", "linewidth": 0.6}
    axes.barh(place, shown, 0.64, left=start, **({"color": colour, "linewidth": 0} if used else hatched))
    text = f"{milliseconds(length)} →" if cut else milliseconds(length)
    ink = colour if colour == LIMIT and used else INK if used else GREY
    axes.annotate(text, (start + shown, place), (4, 0), textcoords="offset points", va="center", size=9, color=ink)


def threads(profile: Profile) -> Figure:
    """Throughput over threads: a line with intervals for each engine, and levels of the demand and of the upper limits."""
    lines, demand = best_loaders(profile), profile["demand"]
    levels = [("demand", demand["images_per_s"], INK, (0, (5, 3)), 1.4)] if demand else []
    levels += [(f"{each['name']} limit", each["images_per_s"], GREY, (0, (1, 2)), 1.0) for each in profile["ceilings"]]
    subtitle = "Images per second over threads. Ring: as configured. Bars: 95 % intervals, at the best prefetch."
    figure, axes = blank(4.0, threads_title(profile), subtitle, 0.75, 1.95)
    now, counts = (profile["spec"]["threads"], profile["images_per_s"]), {profile["spec"]["threads"]}
    labels = []  # text, level and line
    for (engine, points), colour in zip(lines.items(), [WORK, *OTHERS * len(lines)], strict=False):
        ways = [point["threads"] for point in points]
        speeds = [point["images_per_s"] for point in points]
        reach = [[max(s - p["low"], 0.0) for s, p in zip(speeds, points, strict=True)]]
        reach += [[max(p["high"] - s, 0.0) for s, p in zip(speeds, points, strict=True)]]
        bars = axes.errorbar(ways, speeds, reach, color=colour, lw=1.8, marker="o", ms=4, elinewidth=1.2, capsize=2.5, zorder=3)
        labels.append((f"{engine} {speed(speeds[-1])}", speeds[-1], bars[0]))
        counts.update(ways)
    (ring,) = axes.plot(*now, "o", ms=11, mfc="none", mec=INK, mew=1.4, zorder=4, clip_on=False)
    if profile["engine"] not in lines:
        labels.append((f"{profile['engine']} {speed(now[1])}", now[1], ring))
    for name, level, colour, dashes, width in levels:
        labels.append((f"{name} {speed(level)}", level, axes.axhline(level, color=colour, ls=dashes, lw=width, zorder=2)))
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(counts) / 1.15, max(counts) * 1.15)
    axes.xaxis.set_major_locator(FixedLocator([n for n in counts if n == max(counts) or n < max(counts) / 1.3]))
    plain_numbers(axes.xaxis)
    axes.set_xlabel("threads")
    speed_axis(axes, [now[1], *(value for _, value, _ in labels), *(p["images_per_s"] for ps in lines.values() for p in ps)])
    labels.sort(key=lambda label: -label[1])
    names, _, handles = zip(*labels, strict=True)
    axes.legend(handles, names, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8.5, handlelength=1.4)
    return figure


def threads_title(profile: Profile) -> str:
    alone = f"{speed(profile['images_per_s'])} images/s"
    if profile["demand"]:
        return f"The loader delivers {alone}, the demand is {speed(profile['demand']['images_per_s'])}"
    return f"{profile['engine']} with {count(profile['spec']['threads'], 'thread')} delivers {alone}"


def best_loaders(profile: Profile) -> dict[str, list[Profile]]:
    """Engine -> the loaders with the best prefetch depth, by ascending number of threads. The configured engine comes first."""
    best: dict[str, dict[int, Profile]] = {}
    measured = [loader for loader in profile["loaders"] if loader["error"] is None and loader["images_per_s"] is not None]
    for loader in sorted(measured, key=lambda loader: (loader["engine"] != profile["engine"], loader["images_per_s"])):
        best.setdefault(loader["engine"], {})[loader["threads"]] = loader
    return {engine: [points[threads] for threads in sorted(points)] for engine, points in best.items()}


def plain_numbers(axis: Axis) -> None:
    """Tick labels such as 10,000 and 0.1 on any scale. Call it after setting the scale."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def speed_axis(axes: Axes, values: list[float]) -> None:
    """Linear from 0 for similar speeds, logarithmic for very different ones."""
    positive = [value for value in values if value > 0]
    low, high = min(positive, default=1.0), max(positive, default=1.0)
    if high > LOG_FROM * low:
        axes.set_yscale("log")
        margin = (high / low) ** 0.08
        axes.set_ylim(low / margin, high * margin)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(0, high * 1.12)
        axes.yaxis.set_major_locator(MaxNLocator(6))
    plain_numbers(axes.yaxis)
    axes.grid(axis="y", color=PALE, lw=0.5)
    axes.set_axisbelow(True)


def timeline(profile: Profile) -> Figure:
    """A timeline of training steps: computing in blue, waiting for a batch in red."""
    demand = profile["demand"]
    steps = demand["steps"][: STEPS_A_ROW * ROWS]
    rows = math.ceil(len(steps) / STEPS_A_ROW)
    start, end = steps[0]["asked"], max(steps[-1]["done"], steps[0]["asked"] + 1e-9)
    span = (end - start) / rows
    title = f"Training waits for data {share(demand['wait_share'])} of the time"
    those = "" if len(steps) == len(demand["steps"]) else f"the first {len(steps):,} of "
    subtitle = f"{those}{count(len(demand['steps']), 'step')} in a row, {seconds(end - start)} in total"
    figure, axes = blank(1.75 + 0.34 * rows, title, subtitle[0].upper() + subtitle[1:], 0.95 if rows > 1 else 0.2, 0.3)
    for place, step in enumerate(steps):  # two shades distinguish consecutive steps
        strips(axes, step["asked"] - start, step["got"] - start, span, LIMIT)
        strips(axes, step["got"] - start, step["done"] - start, span, SHADES[place % 2])
    axes.set(xlim=(0, span), ylim=(rows - 0.4, -0.6))
    axes.set_yticks(range(rows), [f"from {seconds(row * span)}" for row in range(rows)] if rows > 1 else [""])
    axes.xaxis.set_major_locator(MaxNLocator(6))
    plain_numbers(axes.xaxis)
    axes.set_xlabel("seconds")
    axes.spines["left"].set_visible(False)
    keys = [Patch(color=WORK, label="computing"), Patch(color=LIMIT, label="waiting for a batch")]
    corner = (1 - 0.15 / WIDTH, 1 - 0.36 / figure.get_figheight())
    figure.legend(handles=keys, loc="upper right", bbox_to_anchor=corner, ncols=2, frameon=False, fontsize=8.5, borderpad=0)
    return figure


def strips(axes: Axes, begin: float, end: float, span: float, colour: str) -> None:
    """A time span, which may continue on the next rows."""
    row = int(begin / span)
    while row * span < end:
        left, right = max(begin - row * span, 0.0), min(end - row * span, span)
        if right > left:
            # Unsnapped: a span narrower than a pixel tints it, instead of vanishing or filling it.
            axes.barh(row, right - left, 0.7, left=left, color=colour, linewidth=0, snap=False)
        row += 1
