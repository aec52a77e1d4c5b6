"""The HTML of the report, from runs, charts and evaluations. Text from outside (names, paths, classes) is escaped."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

import torch

from tools.pages import cell, embed_image, page
from tools.profiler.figures import DASH, share, speed, three_digits
from tools.reporting.curves import COLOURS, DASHES, Chart, colour
from tools.reporting.runs import Run, Summary, summary
from tools.reporting.worst import RunEvaluation, TrainingImage, WorstImage, jpeg

MAX_MATRIX = 20  # most classes for which the whole confusion matrix is shown
PAIRS = 20  # pairs of classes to show, if there are more


def _palette(dark: bool) -> str:
    return " ".join(f"--run-{place}: {shades[dark]};" for place, shades in enumerate(COLOURS))


CSS = f"""
:root {{ --hit: 0, 114, 178; --miss: 213, 94, 0; {_palette(False)} }}
@media (prefers-color-scheme: dark) {{ :root {{ color-scheme: dark; --ink: #e4e8eb; --grey: #9aa5ad; --line: #343c43;
  --paper: #15191c; --hit: 75, 166, 224; --miss: 242, 128, 58; {_palette(True)} }} }}
body {{ max-width: 1240px; }}
h1 {{ margin-bottom: 12px; }}
h3 {{ margin: 24px 0 4px; font-size: 15px; line-height: 1.3; overflow-wrap: anywhere; }}
.key {{ display: inline-block; width: 26px; height: 10px; margin-right: 8px; vertical-align: 0; }}
.legend {{ position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: 4px 24px; margin: 0; padding: 8px 0;
  background: var(--paper); font-size: 14px; overflow-wrap: anywhere; max-height: 30vh; overflow-y: auto; }}
.runs th, .runs td {{ padding-left: 15px; }}
.runs th:first-child, .runs td:first-child {{ position: sticky; left: 0; padding-left: 0; background: var(--paper); }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(340px, 100%), 1fr)); gap: 20px 28px; }}
figure {{ margin: 0; min-width: 0; }}
figcaption {{ font-size: 14px; font-weight: 600; }}
.charts svg {{ display: block; width: 100%; height: auto; }}
.images {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(132px, 1fr)); gap: 16px 12px; }}
.images img {{ display: block; width: 100%; height: auto; border-radius: 3px; }}
.images figcaption {{ margin-top: 4px; font-size: 12px; font-weight: 400; line-height: 1.35; overflow-wrap: anywhere; }}
.images i {{ color: var(--grey); font-style: normal; }}
.confusion th, .confusion td {{ padding: 4px 7px; border-bottom: 0; }}
.confusion td {{ text-align: center; vertical-align: middle; min-width: 34px; }}
.confusion thead th.turned {{ writing-mode: vertical-rl; transform: rotate(180deg); text-align: left; padding: 7px 4px; }}
.confusion thead th:first-child {{ padding-left: 0; }}
.confusion tbody th {{ text-align: left; vertical-align: middle; color: var(--ink); padding-left: 0; }}
details {{ margin-top: 12px; font-size: 14px; }} summary {{ color: var(--grey); cursor: pointer; }}
@media (max-width: 520px) {{ .images {{ grid-template-columns: repeat(auto-fill, minmax(104px, 1fr)); }} }}
@media print {{ .legend {{ position: static; }} }}
"""


def html(
    runs: Sequence[Run],
    charts: Sequence[tuple[Chart, str]],
    evaluations: Mapping[str, RunEvaluation | str],
    split: str,
    date: str,
) -> str:
    """The document. charts: from curves.draw. evaluations: by the run's name, from worst.evaluate_runs, or empty. date: when the
    page was made, for people."""
    summaries = [summary(run) for run in runs]
    names = ", ".join(run.name for run in runs)
    body = [
        f"<header><p>Cropfeed · {escape(date)}</p><h1>Training runs</h1></header>",
        *overview(runs, summaries),
        *curves(runs, charts),
        *(
            part
            for place, run in enumerate(runs)
            if run.name in evaluations
            for part in evaluation(place, run, evaluations[run.name], split)
        ),
    ]
    return page(f"Cropfeed: {names}", CSS, body)


def key(place: int) -> str:
    """The line that stands for a run in the charts."""
    dashes = DASHES[place // len(COLOURS) % len(DASHES)]
    pattern = "" if isinstance(dashes, str) else f' stroke-dasharray="{" ".join(str(2 * part) for part in dashes[1])}"'
    line = f'<line x1="0" y1="5" x2="26" y2="5" stroke="{colour(place)}" stroke-width="3"{pattern}/>'
    return f'<svg class="key" viewBox="0 0 26 10" aria-hidden="true">{line}</svg>'


def plain(value: Any) -> str:
    """A value of config.json, or DASH."""
    return DASH if value is None or value == "" else str(value)


def percent(value: float | None) -> str:
    """A rate in 0..1 in percent, rounded as by evaluate.py."""
    return DASH if value is None else f"{100 * value:.2f} %"


def number(value: float | None) -> str:
    return DASH if value is None else f"{value:,.4g}" if value < 100 else f"{value:,.0f}"


def length(run: Run, reached: float | None) -> str:
    """Epochs done, and of how many."""
    planned, steps = run.argument("epochs"), run.argument("iterations")
    if planned is None and steps:
        return f"{number(reached)} ({steps:,} steps)"
    return number(reached) if planned is None or reached == planned else f"{number(reached)} of {planned}"


def sizes(run: Run) -> str:
    """The side of the training crops; with progressive resizing the first and the last."""
    start, size = run.argument("start_size"), plain(run.argument("image_size"))
    return f"{start} → {size}" if start else size


def minutes(seconds: float | None) -> str:
    return DASH if seconds is None else three_digits(seconds / 60)


def best(one: Summary) -> str:
    return DASH if one.best is None else f"{percent(one.best)} ({number(one.best_epoch)})"


COLUMNS: tuple[tuple[str, Callable[[Run, Summary], str]], ...] = (
    ("model", lambda run, _: plain(run.argument("arch"))),
    ("epochs", lambda run, one: length(run, one.epochs)),
    ("image size", lambda run, _: sizes(run)),
    ("batch", lambda run, _: plain(run.argument("batch_size"))),
    ("top-1, last", lambda _, one: percent(one.top1)),
    ("best (epoch)", lambda _, one: best(one)),
    ("top-5, last", lambda _, one: percent(one.top5)),
    ("minutes", lambda _, one: minutes(one.seconds)),
    ("images/s", lambda _, one: speed(one.images_per_s)),
    ("data wait", lambda _, one: share(one.wait_share)),
    ("precision", lambda run, _: plain(run.config.get("precision"))),
    ("processes", lambda run, _: plain(run.config.get("processes"))),
    ("engine", lambda run, _: plain(run.config.get("engine"))),
    ("commit", lambda run, _: plain(run.config.get("commit"))[:12]),
)


def table(heads: Sequence[str], runs: Sequence[Run], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """One row for each run, starting with its name."""
    cells = "".join(cell("th", head) for head in heads)
    yield f'<div class="wide runs"><table><thead><tr><th class="text">run</th>{cells}</tr></thead>'
    for place, (run, row) in enumerate(zip(runs, rows, strict=True)):
        cells = "".join(cell("td", text) for text in row)
        yield f'<tr><td class="text">{key(place)}{escape(run.name)}</td>{cells}</tr>'
    yield "</table></div>"


def overview(runs: Sequence[Run], summaries: Sequence[Summary]) -> Iterator[str]:
    """The table of the runs, and below it the command and machine of each."""
    rows = [[text(run, one) for _, text in COLUMNS] for run, one in zip(runs, summaries, strict=True)]
    yield from table([head for head, _ in COLUMNS], runs, rows)
    yield '<p class="under">Top-1 and top-5: of the validation images, during training. Images/s: the median over the run. Data'
    yield "wait: the share of the run's time in which the device waits for data.</p>"
    yield "<details><summary>Folders, commands and machines</summary>"
    for run in runs:
        facts = {"folder": str(run.folder), "command": shlex.join(map(str, run.config.get("command") or []))}
        facts |= {name: as_text(run.config.get(name)) for name in ("hardware", "versions", "data", "environment")}
        lines = "<br>".join(f"{name}: {escape(text)}" for name, text in facts.items() if text)
        yield f'<h3>{escape(run.name)}</h3><p class="under">{lines}</p>'
    yield "</details>"


def as_text(value: Any) -> str:
    """A value of config.json, which may be an object."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {as_text(part)}" for name, part in value.items())
    return "" if value is None else str(value)


def curves(runs: Sequence[Run], charts: Sequence[tuple[Chart, str]]) -> Iterator[str]:
    yield "<section><h2>Curves</h2>"  # the legend is sticky within this section
    if not charts:
        yield '<p class="under">No run has logged any figures yet.</p></section>'
        return
    yield f'<p class="legend">{"".join(f"<span>{key(place)}{escape(run.name)}</span>" for place, run in enumerate(runs))}</p>'
    yield '<div class="charts">'
    for chart, svg in charts:
        title = f"{chart.title}, against {'minutes' if chart.x == 'seconds' else 'epochs'}"
        labelled = svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
        yield f"<figure><figcaption>{escape(title)}</figcaption>{labelled}</figure>"
    yield "</div></section>"


def evaluation(place: int, run: Run, found: RunEvaluation | str, split: str) -> Iterator[str]:
    """A run's confusion and worst images, or why there are none."""
    yield f"<h2>{key(place)}{escape(run.name)}: errors of the model</h2>"
    if isinstance(found, str):
        yield f'<p class="under">Not evaluated: {escape(found)}</p>'
        return
    accuracy = found.accuracy
    rates = f"top-1 {percent(accuracy.top1_rate)}, top-5 {percent(accuracy.top5_rate)} of {accuracy.images:,} images"
    yield f'<p class="under">{escape(f"{found.weights} on {found.data}, {split}, scheme {found.scheme}: {rates}")}</p>'
    if accuracy.confusion is None:
        yield f'<p class="under">{len(found.classes):,} classes are too many for a confusion matrix.</p>'
    else:
        yield from (confusion if len(found.classes) <= MAX_MATRIX else pairs)(accuracy.confusion, found.classes)
    if found.worst:
        yield "<h3>Images with the lowest probability for their class</h3>"
        yield f'<div class="images">{"".join(image(one, found.classes) for one in found.worst)}</div>'
    if found.batch:
        yield "<h3>First images of the training, before color augmentation and normalization</h3>"
        yield f'<div class="images">{"".join(training_image(one) for one in found.batch)}</div>'


def confusion(matrix: torch.Tensor, classes: Sequence[str]) -> Iterator[str]:
    """The whole matrix: rows are true classes, columns predictions. Shades show shares of the row."""
    heads = "".join(f'<th class="turned">{escape(name)}</th>' for name in classes)
    yield '<div class="wide"><table class="confusion">'
    yield f'<thead><tr><th class="text">true ↓ predicted →</th>{heads}<th>correct</th></tr></thead>'
    for label, (name, counts) in enumerate(zip(classes, matrix.tolist(), strict=True)):
        images = sum(counts)
        cells = [shaded(count, images, place == label) for place, count in enumerate(counts)]
        correct = share(counts[label] / images) if images else DASH
        yield f"<tr><th>{escape(name)}</th>{''.join(cells)}{cell('td', correct)}</tr>"
    yield "</table></div>"


def shaded(count: int, images: int, correct: bool) -> str:
    if not count:
        return "<td></td>"
    # Errors of a good model are rare: the square root makes a few of them visible.
    depth = 0.75 * (count / images if correct else (count / images) ** 0.5)
    return f'<td style="background: rgba(var(--{"hit" if correct else "miss"}), {depth:.2f})">{count:,}</td>'


def pairs(matrix: torch.Tensor, classes: Sequence[str]) -> Iterator[str]:
    """The pairs of classes that are confused most often."""
    images = matrix.sum(dim=1).tolist()
    wrong = matrix.clone().fill_diagonal_(0).flatten()
    counts, places = wrong.sort(descending=True, stable=True)
    heads = cell("th", "true", True) + cell("th", "predicted", True) + cell("th", "images") + cell("th", "of the class")
    yield f'<div class="wide"><table><thead><tr>{heads}</tr></thead>'
    for count, place in zip(counts[:PAIRS].tolist(), places[:PAIRS].tolist(), strict=True):
        if count:
            label, prediction = divmod(place, len(classes))
            names = cell("td", classes[label], True) + cell("td", classes[prediction], True)
            yield f"<tr>{names}{cell('td', f'{count:,}')}{cell('td', share(count / images[label]))}</tr>"
    yield "</table></div>"
    if not int(torch.count_nonzero(wrong)):
        yield '<p class="under">None: every image is classified correctly.</p>'


def image(one: WorstImage, classes: Sequence[str]) -> str:
    true, predicted = escape(classes[one.label]), escape(classes[one.prediction])
    lines = [
        f"<b>{true}</b> {small(one.label_probability)}",
        f"predicted: {predicted} {small(one.prediction_probability)}" if one.prediction != one.label else "classified correctly",
        f"<i>{one.id}: {escape(one.key)}</i>",
    ]
    return f"<figure>{embed_image(one.key, jpeg(one.pixels), 'jpeg')}<figcaption>{'<br>'.join(lines)}</figcaption></figure>"


def training_image(one: TrainingImage) -> str:
    name = escape(one.name)
    embedded = embed_image(f"training image {one.id}", jpeg(one.pixels), "jpeg")
    return f"<figure>{embedded}<figcaption><b>{name}</b><br><i>{one.id}</i></figcaption></figure>"


def small(probability: float) -> str:
    """A probability in percent, as HTML. It is never rounded to 0."""
    return "&lt;&nbsp;0.01&nbsp;%" if probability < 1e-4 else f"{100 * probability:.2g}&nbsp;%"
