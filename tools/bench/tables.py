"""Write the tables of README.md and docs/*.md, and the README's chart, from the rows of tools/bench/results/*.csv.

    python tools/bench/tables.py             update the files in place
    python tools/bench/tables.py --check     change nothing; list the stale tables, and exit with code 1 if there are any

A table stands between the lines `<!-- table: NAME -->` and `<!-- end table -->`. TABLES has the names, and the docstring of each
table's function says which rows it picks. A run is all rows of one date, commit and command.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import _path  # noqa: F401

from pipeline.cli import Parser, run_cli
from pipeline.errors import UserError
from pipeline.store import files
from tools import ROOT
from tools.bench import labels
from tools.bench.chart import bar_chart
from tools.bench.labels import tidy
from tools.bench.recording import RESULTS
from tools.bench.rows import Row, conditions, newest, pairs, pick, read, runs, show, spread, table

END = "<!-- end table -->"
BLOCK = re.compile(rf"^<!-- table: (.*) -->$(?:\n(?!<!-- table: ).*)*?\n{END}$", re.MULTILINE)
BEGIN = re.compile(r"^[ \t]*<!-- *table: *(.*?) *-->", re.MULTILINE)


# Tables


def compared(results: Path, dtype: str) -> list[Row]:
    """The run of compare.py with batches of this dtype that has the most other loaders; the newest of these."""

    def peers(run: list[Row]) -> int:
        rates = (row for row in run if row["metric"] == "images_per_s")
        return len({(row["engine"], row["kind"]) for row in rates if not re.match("cropfeed-|decode-", row["engine"])})

    found = runs(row for row in read(results, "compare") if f" {dtype}," in row["spec"])
    return max(reversed(found), key=peers)


def loader_table(run: list[Row], loaders: Iterable[tuple[str, tuple[str, ...]]]) -> list[str]:
    """loaders: label, and engines; the fastest of them on each kind of images is shown. Labels without rows are left out."""
    rates = [row for row in run if row["metric"] == "images_per_s"]
    lines: list[tuple[bool, float, list[str]]] = []  # Cropfeed first, then by throughput
    for label, engines in loaders:
        cells, order = [label], 0.0
        for group in ("original", "500"):
            own = [row for row in rates if row["engine"] in engines and labels.GROUPS.get(row["kind"], row["kind"]) == group]
            best = max(own, key=lambda row: float(row["value"]), default=None)
            ratio = best and pick(run, engine=best["engine"], kind=best["kind"], metric="ratio_to_fastest_peer")
            size = best and pick(run, engine=best["engine"], kind=best["kind"], metric="kb_per_image")  # older rows have none
            cells.append(show(best) + show(ratio, " ({:.2f} ×)") + show(size, ", {:,.0f} kB"))
            order = order or float(best["value"] if best else 0)
        lines.append((not label.startswith("**"), -order, cells))
    disk = ", kB on disk" if any(row["metric"] == "kb_per_image" for row in run) else ""
    head = f"images/s (× the fastest other loader){disk}", *labels.IMAGES
    note = f"{conditions(rates[0])}; medians of {rates[0]['repeats']} repeats, ratios within each repeat"
    return table(head, [cells for _, _, cells in sorted(lines) if any(cells[1:])], rates, note)


def summary(results: Path) -> list[str]:
    """See `compared`; a few loaders."""
    return loader_table(compared(results, "uint8"), labels.SUMMARY)


def chart(results: Path) -> str:
    """The summary's throughput on original files, as an SVG image."""
    run = [row for row in compared(results, "uint8") if row["metric"] == "images_per_s"]
    bars = []
    for label, engines in labels.SUMMARY:
        rates = [float(row["value"]) for row in run if row["engine"] in engines and row["kind"] in ("original", "lossless")]
        if rates:
            bars.append((label.replace("*", ""), max(rates), label == labels.CPU[0]))
    title = "Images/s on two CPU cores: full-size ImageNet images, random crops of 224 pixels"
    return bar_chart(title, sorted(bars, key=lambda bar: -bar[1]))


def comparison(results: Path, dtype: str = "uint8") -> list[str]:
    """See `compared`; all loaders."""
    run = compared(results, dtype)
    known = {engine for _, engines in labels.LOADERS for engine in engines}
    engines = dict.fromkeys(row["engine"] for row in run if row["metric"] == "ratio_to_fastest_peer")
    return loader_table(run, [*labels.LOADERS, *((name, (name,)) for name in engines if name not in known)])


def goals(results: Path) -> list[str]:
    """The runs of the tables comparison, regions, converter, profiler and tuning; the newest comparison in the table accuracy."""
    faults = [row for row in newest(results, "profile", "planted fault") if row["metric"] == "predicted_over_measured"]
    worst_last = sorted(faults, key=lambda row: abs(float(row["value"]) - 1))
    found = {
        "compare": compared(results, "uint8"),
        "region": newest(results, "region"),
        "convert": newest(results, "convert"),
        "profile": [*worst_last, *newest(results, "profile", "tuning")],
        "accuracy": [pair for pair in pairs(results) if pair.baseline == "plain"][-1].ratios,
    }
    lines = []
    for text, low, high, unit, name, columns in labels.GOALS:
        if row := pick(found[name], **columns):
            value = float(row["value"])
            goal = f"≤ {high:g}" if low == 0 else f"≥ {low:g}" if high == labels.INF else f"{low:g} to {high:g}"
            shown = f"{value:,.0f}" if value >= 10 else f"{value:.2f}"
            lines.append((text, f"{goal} {unit}", f"{shown} {unit}", "yes" if low <= value <= high else "**no**"))
    return table(("", "goal", "measured", "reached"), lines, (row for rows in found.values() for row in rows))


def regions(results: Path) -> list[str]:
    """The newest run of bench_region.py."""
    run, profiles = newest(results, "region"), ("original", "lossless", "compact")
    lines = []
    for label, benchmark, style in labels.REGIONS:
        cells = [show(pick(run, benchmark=benchmark.format(profile=profile), kind=profile), style) for profile in profiles]
        lines.append((label, *cells))
    return table(("per image, one core", *profiles), lines, run, conditions(run[0]))


def views(results: Path) -> list[str]:
    """The newest run of bench_views.py."""
    run, lines = newest(results, "views"), []
    for name, label in labels.VIEWS.items():
        cost, over = pick(run, metric=f"{name}, CPU ms/image"), pick(run, metric=f"{name} / one view")
        lines.append((label, show(cost, "{:.2f}"), show(over, "{:.2f} ×")))
    metrics = "2 x 224 / one view, overlap >= 0.5", "images with overlap >= 0.5, %"
    near, share = (pick(run, metric=metric) for metric in metrics)
    label = show(share, "two of 224 that overlap by half or more ({:.0f} % of images)")
    lines.append((label, "", show(near, "{:.2f} ×")))
    return table(("random views of an image", "CPU time, ms", "over one view"), lines, run, tidy(run[0]["spec"]))


def converter(results: Path) -> list[str]:
    """The newest run of bench_convert.py."""
    run, lines = newest(results, "convert"), []
    for label, engine in labels.CONVERTERS:
        metrics = "images_per_s", "times_ffcv_writer", "bytes_ratio"
        rate, speedup, size = (pick(run, engine=engine, metric=metric) for metric in metrics)
        if rate:
            lines.append((label, show(rate), show(speedup, "{:.2f} ×"), show(size, "{:.3f}")))
    head = "", "images/s", "over FFCV's writer", "size over the source"
    memory = [f"{show(row)} MB for {row['spec'].split(', ')[1]}" for row in run if row["metric"] == "peak_memory_mb"]
    peak = f"; peak memory with one worker: {', '.join(memory)}" if memory else ""
    return table(head, lines, run, f"{run[0]['spec']}; medians of repeats{peak}")


def profiler(results: Path) -> list[str]:
    """The newest run of bench_profiler.py's planted faults."""
    run, lines = newest(results, "profile", "planted fault"), []
    for spec in dict.fromkeys(row["spec"] for row in run):
        fault, remedy = re.split("; ", re.split(r" \(|, which", spec)[0])
        predicted, measured = (pick(run, spec=spec, metric=metric) for metric in ("predicted_gain", "measured_gain"))
        remedy = remedy.replace("--precision", "--amp")  # train.py's flag, which had another name in older rows
        remedy = f"`{remedy}`" if remedy.startswith("--") else remedy
        lines.append((tidy(fault), remedy, show(predicted, "{:.2f} ×"), show(measured, "{:.2f} ×") + spread(measured)))
    head = "planted fault", "remedy that the profiler names", "predicted gain", "measured gain (range)"
    return table(head, lines, run, "Medians of repeats")


def foreign(results: Path) -> list[str]:
    """The newest rows of bench_foreign.py for each loader."""
    rows = [row for row in read(results, "profile") if row["benchmark"] == "foreign loader"]
    label = {engine: name for name, engines in labels.LOADERS for engine in engines}
    lines, shown = [], []
    for loader in dict.fromkeys(row["spec"].split("; ")[0] for row in rows):
        own = [row for row in rows if row["spec"].startswith(f"{loader}; ")]
        metrics = "predicted_gain", "measured_gain", "predicted_over_measured"
        predicted, measured, ratio = found = [pick(own, metric=metric) for metric in metrics]
        gains = show(predicted, "{:.2f} ×"), show(measured, "{:.2f} ×") + spread(measured)
        lines.append((label[loader], *gains, show(ratio, "{:.2f}")))
        shown += [row for row in found if row]
    head = "loader", "predicted gain", "measured gain (range)", "predicted over measured"
    return table(head, lines, shown, tidy(rows[-1]["spec"].split("; ")[1]))


def tuning(results: Path) -> list[str]:
    """Every run of bench_profiler.py's comparison of the tuned settings with all settings."""
    found = runs(row for row in read(results, "profile") if row["benchmark"] == "tuning")
    metrics = ("chosen_over_best", "{:.2f}"), ("seconds", "{:.0f} s")
    lines = [(run[0]["spec"], *(show(pick(run, metric=metric), style) for metric, style in metrics)) for run in found]
    head = "chosen settings", "throughput over the best settings", "time to tune"
    return table(head, lines, (row for run in found for row in run))


def accuracy(results: Path) -> list[str]:
    """See `pairs`."""

    def moments(rows: list[Row], metric: str, style: str) -> str:
        middle = pick(rows, metric=f"{metric}, mean") or pick(rows, metric=metric)
        return show(middle, style) + show(pick(rows, metric=f"{metric}, standard deviation"), f" ± {style}")

    found, lines = pairs(results), []
    for pair in found:
        sides = (("last top-1, %", "{:.2f}"), ("minutes", "{:.1f}"))
        reached = [", ".join(moments(side, *metric) for side in (pair.own, pair.other)) for metric in sides]
        levels = ("", *(f" to {level} %" for level in labels.LEVELS))
        ratios = [moments(pair.ratios, f"minutes{level}, ratio", "{:.2f}") for level in levels]
        baseline = labels.BASELINES.get(pair.baseline, pair.baseline)
        lines.append((tidy(pair.training), baseline, *reached, *ratios, pair.conditions))
    rows = [row for pair in found for row in (*pair.own, *pair.other, *pair.ratios)]
    head = "training", "baseline", "top-1, %: Cropfeed, baseline", "minutes: Cropfeed, baseline", "ratio of the minutes"
    reaching = (f"ratio of the minutes to {level} % top-1" for level in labels.LEVELS)
    return table((*head, *reaching, "conditions"), lines, rows, "Means ± standard deviations over seeds")


def degradation(results: Path) -> list[str]:
    """The newest run of tools/paper/degradation.py."""
    run, lines = newest(results, "degradation"), []
    for name in dict.fromkeys(row["benchmark"] for row in run):
        errors = [pick(run, benchmark=name, metric=metric) for metric in ("train_error_%", "val_error_%")]
        lines.append((tidy(name), *(show(row, "{:.1f}") + spread(row, "{:.1f}") for row in errors)))
    return table(("top-1 error, %: mean (range)", "training, last epoch", "validation"), lines, run, f"`{run[0]['spec']}`")


def testing(results: Path) -> list[str]:
    """On the data of the newest evaluation, the newest row of each model and scheme. Not members read from saved predictions."""
    rows = [row for run in runs(read(results, "testing")) for row in run if row["metric"] == "top1" and ".npz" not in row["spec"]]
    places = [row["spec"].rsplit(", ", 3) for row in rows]  # model, data, split, precision
    found = {(place[0], row["benchmark"]): row for place, row in zip(places, rows, strict=True) if place[1:] == places[-1][1:]}
    models, schemes = (dict.fromkeys(key[i] for key in found) for i in (0, 1))
    lines = [
        (labels.SCHEMES.get(scheme, scheme.replace("scale-", "whole image, short side ")),
         *(show(found.get((model, scheme)), "{:.1f}", factor=100) for model in models))
        for scheme in schemes
    ]  # fmt: skip
    head = "top-1, %", *(tidy(model).replace("all, averaged", "ensemble, average of all") for model in models)
    return table(head, lines, found.values(), ", ".join(places[-1][1:]))


def training(results: Path) -> list[str]:
    """The newest run of each spec."""
    found = {run[0]["spec"]: run for run in runs(read(results, "training"))}
    lines = []
    for spec, run in found.items():
        value = {row["metric"]: row for row in run}
        data, what = spec.split(", ", 1)
        given = re.findall(r"--data (\S+)", run[0]["command"])[0]
        top = ", ".join(show(value[f"val_top{n}"], f"{{:.1f}} % top-{n}", factor=100) for n in (1, 5) if "val_top1" in value)
        loss = show(value.get("first_train_loss"), "training loss {:.2f}") + show(value.get("last_train_loss"), " to {:.2f}")
        numbers = ("minutes", "{:.1f}", 1), ("images_per_s", "{:.1f}", 1), ("wait_share", "{:.1f} %", 100)
        cells = (show(value.get(name), style, factor=factor) for name, style, factor in numbers)
        lines.append((labels.DATA.get(given) or labels.DATA.get(data, data), tidy(what), run[0]["engine"], top or loss, *cells))
    head = "images", "training", "engine", "result", "minutes", "images/s", "data wait"
    return table(head, lines, (row for run in found.values() for row in run))


def scale(results: Path) -> list[str]:
    """The newest run of bench_scale.py."""
    run, lines = newest(results, "scale"), []
    python = [row for row in run if row["metric"] == "python_us_per_image"]
    run = [row for row in run if row not in python]
    styles = {"open_ms": "{:.1f}", "resume_ms": "{:.2f}", "plan_us_per_image": "{:.2f}", "memory_grown_mb": "{:.1f}"}
    for spec in dict.fromkeys(row["spec"] for row in run):
        cells = (show(pick(run, spec=spec, metric=metric), style) for metric, style in styles.items())
        name = spec.rpartition(", batch")[0].removesuffix(", order full").replace(" samples", "")
        lines.append((re.sub(r"\d+", lambda digits: f"{int(digits[0]):,}", name), *cells))
    head = "samples", "open, ms", "resume, ms", "plan an image, µs", "memory, MB"
    note = "".join(f"Python takes {show(row, '{:.1f}')} µs for an image ({row['spec']}); " for row in python)
    return table(head, lines, run, f"{note}{run[0]['spec'].split(', ', 1)[1]}; medians of {run[0]['repeats']} repeats")


def cold(results: Path) -> list[str]:
    """The newest run of bench_cold.py for each order."""
    lines, rows = [], []
    for spec, run in {run[0]["spec"]: run for run in runs(read(results, "cold"))}.items():
        images, order = spec.split(", ")[:2]
        for name in ("warm", "cold", "cold without reading ahead"):
            own = [row for row in run if row["benchmark"] == name]
            cells = (
                show(pick(own, metric=metric), style) for metric, style in (("images_per_s", "{:,.0f}"), ("over_warm", "{:.2f}"))
            )
            lines.append((f"{order}, {name}", *cells))
        disk = show(pick(run, benchmark="disk"), "{:,.0f}")
        rows += [row for row in run if row["benchmark"] != "disk"]
    return table(("", "images/s", "over warm"), lines, rows, f"{images}; the disk reads {disk} MB/s; medians of repeats")


def remote(results: Path) -> list[str]:
    """The newest run of bench_remote.py for each spec."""
    lines, rows = [], []
    styles = {"images_per_s": "{:,.0f}", "kb_per_image": "{:,.0f}", "requests_per_image": "{:.2f}"}
    for run in {run[0]["spec"]: run for run in runs(read(results, "remote"))}.values():
        for spec in dict.fromkeys(row["spec"] for row in run):
            mode, crops, latency, bandwidth, _ = spec.split(", ")
            cells = (show(pick(run, spec=spec, metric=metric), style) for metric, style in styles.items())
            lines.append((crops, bandwidth, labels.REMOTE[mode], *cells))
        rows += run
    note = f"{latency} of latency, {run[0]['cache']} fit into the cache; medians of repeats"
    return table(("crops", "bandwidth", "read", "images/s", "kB an image", "requests an image"), lines, rows, note)


def robustness(results: Path) -> list[str]:
    """The newest rows of kills.csv and mutants.csv."""
    run = [*newest(results, "kills"), *newest(results, "mutants")]
    lines = [(labels.ROBUSTNESS.get(row["benchmark"], row["benchmark"]), show(row), row["spec"]) for row in run]
    return table(("", "count", "setting"), lines, run)


FUNCTIONS = (
    summary, comparison, goals, regions, views, converter, profiler, foreign, tuning, accuracy, degradation, testing, training,
    scale, cold, remote, robustness,
)  # fmt: skip
TABLES: dict[str, Callable[[Path], list[str]]] = {
    **{function.__name__: function for function in FUNCTIONS},
    "comparison-float32": partial(comparison, dtype="float32"),
}


# Files


def filled(file: Path, results: Path) -> tuple[str, list[str]]:
    """The file's text with new tables, and the names of those that were stale."""
    text = file.read_text(encoding="utf-8")
    stale: list[str] = []
    names = BEGIN.findall(text)
    for name in names:
        if name not in TABLES:
            raise UserError(f"{file}: unknown table {name}", f"known tables: {', '.join(TABLES)}")
    if names != [found[1] for found in BLOCK.finditer(text)]:
        raise UserError(f"{file}: a table's markers are incomplete", f"put <!-- table: NAME --> and {END} on lines of their own")

    def fill(found: re.Match[str]) -> str:
        new = "\n".join([f"<!-- table: {found[1]} -->", "", *TABLES[found[1]](results), "", END])
        if new != found[0]:
            stale.append(found[1])
        return new

    return BLOCK.sub(fill, text), stale


def update(root: Path, results: Path, check: bool = False) -> list[str]:
    """Write the tables and the chart below `root`, unless `check`. Returns the stale ones, as "file: name"."""
    found = []
    image = root / "docs" / "images" / "comparison.svg"
    if image.parent.exists() and not (image.exists() and image.read_text() == chart(results)):
        found.append(f"{image.relative_to(root)}: chart")
        if not check:
            files.write(str(image), chart(results).encode())
    for file in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        if file.exists():
            text, stale = filled(file, results)
            if stale and not check:
                files.write(str(file), text.encode())
            found += [f"{file.relative_to(root)}: {name}" for name in stale]
    return found


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with code 1 if a table is stale")
    args = parser.parse_args()
    stale = update(ROOT, RESULTS, args.check)
    for table_name in stale:
        print(f"{table_name}: {'stale; run python tools/bench/tables.py' if args.check else 'updated'}")
    if stale and args.check:
        sys.exit(1)


if __name__ == "__main__":
    run_cli(main)
