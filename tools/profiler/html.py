"""A profile as one self-contained HTML file, and `write_report`, which writes it to a folder."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.store import files
from tools.pages import embed_image, page
from tools.profiler.figures import gain, gain_interval, interval, share, speed
from tools.profiler.table import sections, text

Profile = dict[str, Any]
TAGS = {"input": "INPUT-BOUND", "compute": "COMPUTE-BOUND", "balanced": "BALANCED"}
CHARTS = {
    "stages": "Time per image, by stage",
    "threads": "Images per second over threads",
    "timeline": "Timeline of training steps",
}
CSS = """
:root { --work: #2f6690; --held-up: #c0392b; --even: #3b7a57; }
h1 { display: inline-block; padding: 5px 12px; border-radius: 4px; color: #fff; letter-spacing: .05em;
  print-color-adjust: exact; -webkit-print-color-adjust: exact; }
h1.input { background: var(--held-up); } h1.compute { background: var(--work); } h1.balanced { background: var(--even); }
h1.alone { background: var(--grey); }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(145px, 1fr)); gap: 20px 24px;
  margin: 24px 0 0; padding: 0; }
header h1 + p { margin-top: 6px; }
.numbers dt { color: var(--grey); font-size: 13px; }
.numbers dd { margin: 0; }
.numbers b { display: block; font-size: 30px; line-height: 1.2; font-weight: 600; white-space: nowrap; }
.numbers b.bad { color: var(--held-up); }
.numbers i { color: var(--grey); font-size: 13px; font-style: normal; }
.verdict { margin: 24px 0 0; font-size: 17px; overflow-wrap: anywhere; }
.remedy { margin: 24px 0 0; padding: 4px 0 4px 16px; border-left: 4px solid var(--work); }
.remedy p { margin: 0; overflow-wrap: anywhere; }
.remedy .label { color: var(--grey); font-size: 13px; }
.remedy .change { font-size: 19px; font-weight: 600; }
figure { margin: 32px 0 0; }
img { display: block; width: 100%; max-width: 760px; height: auto; margin-left: max(-18px, -2.4%); }
pre { margin: 32px 0 0; overflow-x: auto; font-size: 13px; line-height: 1.45; }
@media (max-width: 520px) { .numbers { grid-template-columns: 1fr 1fr; gap: 16px; } .numbers b { font-size: 25px; } }
@media print { .numbers, .remedy { break-inside: avoid; } img { margin-left: 0; } }
"""


def html(profile: Profile, pngs: dict[str, bytes]) -> str:
    """The report. pngs: the charts, from `charts.draw`."""
    parts = [
        *header(profile),
        *numbers(profile),
        f'<p class="verdict">{escape(profile["verdict"]["text"])}</p>',
        *remedy(profile),
        *(f"<figure>{embed_image(CHARTS[name], pngs[name])}</figure>" for name in CHARTS if name in pngs),
        *(f"<pre>{escape(text(section))}</pre>" for section in sections(profile)),
    ]
    return page(f"Cropfeed profile: {profile['data']['path']}", CSS, parts)


def header(profile: Profile) -> Iterator[str]:
    """The data, and the bottleneck: of training or, without a demand, of the loader."""
    verdict, data, made = profile["verdict"], profile["data"], profile["made"]
    kind, tag = verdict["limit"], TAGS[verdict["limit"]]
    if not profile["demand"]:
        kind, tag = "alone", f"LOADER LIMITED BY {verdict['stage'].upper()}"
    yield f"<header><p>Cropfeed input profile · {escape(data['path'])}, {escape(data['split'])} · {escape(made['date'])}</p>"
    yield f'<h1 class="{kind}">{escape(tag)}</h1>'
    if made["planted"]:
        yield f"<p>With an injected fault: {escape(made['planted'])}</p>"
    yield "</header>"


def numbers(profile: Profile) -> Iterator[str]:
    """The most important figures, in large type."""
    demand = profile["demand"]
    yield '<dl class="numbers">'
    yield number("Loader alone, images/s", speed(profile["images_per_s"]), interval(profile["low"], profile["high"]))
    if demand:
        both, bad = demand["training"], profile["verdict"]["limit"] == "input"
        yield number("Demand of the model, images/s", speed(demand["images_per_s"]), interval(demand["low"], demand["high"]))
        yield number("Training, images/s", speed(both["images_per_s"]), interval(both["low"], both["high"]))
        yield number("Data wait", share(demand["wait_share"]), "of the training time", bad)
    yield "</dl>"


def number(name: str, value: str, under: str, bad: bool = False) -> str:
    return f"<div><dt>{escape(name)}</dt><dd><b{' class=bad' * bad}>{escape(value)}</b><i>{escape(under)}</i></dd></div>"


def remedy(profile: Profile) -> Iterator[str]:
    """The remedy to try first, with its predicted gain and, if it was tried, its measured gain."""
    verdict, tried = profile["verdict"], profile["applied"]
    gains = f"{gain(verdict['predicted_gain'])} predicted"
    if tried and tried["remedy"] == verdict["remedy"] and tried["change"] == verdict["change"]:
        gains = f"{gain(tried['predicted_gain'])} predicted"
        if tried["measured_gain"] is not None:
            gains += f", {gain(tried['measured_gain'])} measured ({gain_interval(tried['low'], tried['high'])})"
    yield '<div class="remedy"><p class="label">What to change first</p>'
    yield f'<p class="change">{escape(verdict["change"])}</p>'
    yield f"<p>{escape(gains)}</p></div>" if verdict["remedy"] != "none" else "</div>"


def write_report(profile: Profile, folder: Path) -> Path:
    """Write folder/report.html by an atomic write; returns its path."""
    try:
        from tools.profiler import charts
    except ImportError as error:
        raise UserError(f"{folder}: matplotlib is not installed", "pip install -e '.[report]', or leave out --report") from error
    report = folder / "report.html"
    try:
        files.write(str(report), html(profile, charts.draw(profile)).encode())
    except (OSError, UserError) as error:
        raise UserError(f"{folder}: the report cannot be written there ({error})", "name another folder") from error
    return report
