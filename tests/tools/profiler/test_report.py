"""A profile's figures as text. The terminal's tables and the HTML report show the same strings."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import jsonschema
import pytest

from pipeline.errors import UserError
from tests.helpers import ROOT
from tests.tools.profiler.profiles import (
    EXAMPLES,
    Profile,
    ahead,
    applied,
    compute_bound,
    far_apart,
    input_bound,
    no_demand,
    not_applied,
    on_a_gpu,
    throttled,
    tuned,
)
from tools.profiler import figures
from tools.profiler.html import html, write_report
from tools.profiler.table import WIDTH, table

SCHEMA = json.loads((ROOT / "tools" / "profiler" / "schema.json").read_text())
HOSTILE = "/data/<script>alert(1)</script> & \"shards\" 'x'"


class Shown(HTMLParser):
    """The report's text, the lines of its tables, and its references."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.rows: list[str] = []
        self.references: list[str] = []
        self.tags: set[str] = set()
        self.hidden = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.hidden = tag in ("style", "script")
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]

    def handle_endtag(self, tag: str) -> None:
        self.hidden = False

    def handle_data(self, data: str) -> None:
        if not self.hidden and data.strip():
            self.texts.append(data)
            self.rows += data.splitlines()

    @property
    def text(self) -> str:
        return plain(" ".join(self.texts))


def plain(text: str) -> str:
    return " ".join(text.split())


def shown(text: str, line: str) -> bool:
    """Whether a line contains a figure, and not only as part of a longer one."""
    return re.search(rf"(?<![\w.,]){re.escape(text)}(?![\w]|[.,]\d)", line) is not None


def assert_row(profile: Profile, *texts: str) -> None:
    """Assert that a line of the table and a row of the report contain all of these."""
    for kind, lines in (("table", table(profile).splitlines()), ("HTML", Shown(html(profile, {})).rows)):
        assert any(all(shown(text, plain(line)) for text in texts) for line in lines), f"{kind}: no row with {texts}"


def spread(given: Profile) -> tuple[str, str]:
    return figures.speed(given["images_per_s"]), figures.interval(given["low"], given["high"])


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_are_valid_by_the_schema(example: Callable[[], Profile]) -> None:
    jsonschema.validate(example(), SCHEMA)


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (figures.speed(4_008.6), "4,009"),
        (figures.speed(50.93), "50.9"),
        (figures.speed(99.97), "100"),
        (figures.speed(8.2), "8.20"),
        (figures.speed(0.0), "0"),
        (figures.speed(None), "–"),
        (figures.interval(3_950.2, 4_068.4), "3,950 to 4,068"),
        (figures.interval(None, None), "–"),
        (figures.milliseconds(0.003124), "0.00312 ms"),
        (figures.milliseconds(0.3301), "0.330 ms"),
        (figures.milliseconds(8_213.4), "8,213 ms"),
        (figures.share(0.1241), "12 %"),
        (figures.share(0.0182), "1.8 %"),
        (figures.share(0.0997), "10 %"),
        (figures.share(0.0), "0 %"),
        (figures.share(1.0), "100 %"),
        (figures.gain(1.8234), "1.82 ×"),
        (figures.gain(1_234.5), "1,234 ×"),
        (figures.gain_interval(1.7913, 1.9118), "1.79 × to 1.91 ×"),
        (figures.bytes_rate(1.913e9), "1.91 GB/s"),
        (figures.bytes_rate(20.1e6), "20.1 MB/s"),
        (figures.size(110_004.2), "110 kB"),
        (figures.size(999_900.0), "1.00 MB"),
        (figures.size(512), "512 B"),
        (figures.amount(2.0, "cores"), "2 cores"),
        (figures.amount(13.42, "cores"), "13.4 cores"),
        (figures.amount(2.728e9, "bytes/s"), "2.73 GB/s"),
        (figures.amount(None, "cores"), "–"),
        (figures.count(1, "thread"), "1 thread"),
        (figures.count(16, "thread"), "16 threads"),
    ],
)
def test_format_of_figures(made: str, text: str) -> None:
    assert made == text


@pytest.mark.parametrize("example", EXAMPLES)
def test_table_and_report_show_the_same_figures(example: Callable[[], Profile]) -> None:
    profile = example()
    verdict, ceiling = profile["verdict"], profile["storage"]["bytes_per_s"]
    for stage in profile["stages"]:
        for at in stage["at"]:
            assert_row(profile, str(at["threads"]), *spread(at), figures.milliseconds(at["ms_per_image"]))
        assert_row(profile, stage["name"], *spread(stage["at"][0]))
    for loader in profile["loaders"]:
        way = (loader["engine"], str(loader["threads"]), str(loader["prefetch"]))
        if loader["error"]:
            assert_row(profile, *way, loader["error"])
            continue
        shares = [figures.share(loader[name]) for name in ("cpu_share", "gpu_share", "jpeg_share") if loader[name] is not None]
        rate = loader["bytes_per_s"]
        assert_row(profile, *way, *spread(loader), *shares, figures.bytes_rate(rate), figures.share(rate / ceiling))
    assert_row(profile, "loader alone", *spread(profile))
    for limit in profile["ceilings"]:
        assert_row(profile, limit["name"], figures.speed(limit["images_per_s"]), limit["why"])
    for remedy in (verdict, *verdict["others"]):
        assert_row(profile, remedy["change"], figures.gain(remedy["predicted_gain"]))


@pytest.mark.parametrize("example", EXAMPLES)
def test_report_opens_with_the_answer(example: Callable[[], Profile]) -> None:
    profile = example()
    demand = profile["demand"]
    text, page = plain(table(profile)), Shown(html(profile, {})).text
    verdict = profile["verdict"]["text"]
    assert text.startswith(verdict)
    top = page[: page.index(verdict)]
    numbers = [figures.speed(profile["images_per_s"])]
    if demand:
        numbers += [figures.speed(demand["images_per_s"]), figures.speed(demand["training"]["images_per_s"])]
        numbers += [figures.share(demand["wait_share"])]
    assert all(shown(number, top) for number in numbers)
    tags = {"input": "INPUT-BOUND", "compute": "COMPUTE-BOUND", "balanced": "BALANCED"}
    expected = tags[profile["verdict"]["limit"]] if demand else "LOADER LIMITED BY DECODE"
    assert [tag for tag in (*tags.values(), "LOADER LIMITED BY DECODE") if tag in top] == [expected]


@pytest.mark.parametrize("example", [input_bound, compute_bound, throttled, on_a_gpu, far_apart])
def test_demand_is_shown(example: Callable[[], Profile]) -> None:
    profile = example()
    demand = profile["demand"]
    assert_row(profile, "train step alone", *spread(demand))
    names = ("wait_share", "ready", "cpu_share", "gpu_share", "jpeg_share")
    shares = [figures.share(demand[name]) for name in names if demand[name] is not None]
    assert_row(profile, "training from the loader", *spread(demand["training"]), *shares)
    for text in (plain(table(profile)), Shown(html(profile, {})).text):
        assert demand["what"] in text
        assert ("emulated by waiting" in text) == demand["emulated"]


def test_without_demand_no_training_is_shown() -> None:
    for text in (table(no_demand()), Shown(html(no_demand(), {})).text):
        assert "No demand was measured" in text
        assert "data wait" not in text.lower()
        assert "train step alone" not in text


def test_tried_remedy_is_shown_with_its_prediction() -> None:
    assert_row(applied(), "--threads 2", "1.91 ×", "1.85 ×", "1.79 × to 1.91 ×")
    page = Shown(html(applied(), {})).text
    assert "1.91 × predicted, 1.85 × measured (1.79 × to 1.91 ×)" in page
    assert "measured (" not in Shown(html(input_bound(), {})).text
    assert_row(not_applied(), "--threads 2 (not tried: the cores are taken)", "1.91 ×")
    other = applied()
    other["applied"]["change"] = "--threads 4"  # a remedy other than the verdict's gets its own row
    assert_row(other, "--threads 4", "1.85 ×")
    assert not any("--threads 2" in line and "1.85 ×" in line for line in table(other).splitlines())


def test_tuned_and_plan_are_shown_if_present() -> None:
    assert_row(tuned(), "2", "8", "3,962", "41.4 s")
    assert "/home/me/cropfeed-tuned.json" in Shown(html(tuned(), {})).text
    assert "/home/me/cropfeed-tuned.json" in table(tuned())
    for need in ahead()["ahead"]["needs"]:
        needed, here = (figures.amount(need[name], need["unit"]) for name in ("needed", "here"))
        assert_row(ahead(), need["name"], needed, here, figures.gain(need["needed"] / need["here"]) if need["here"] else "–")
    for text in (plain(table(ahead())), Shown(html(ahead(), {})).text):
        assert ahead()["ahead"]["text"] in text
        assert "4 hosts of 8 GPUs, 3,100 images/s each, 99,200 in total" in text
        assert text.count("first bottleneck: 0.541 ms per image and core") == 1
    for title in ("Tuned", "Plan"):
        assert title not in table(input_bound())
        assert title not in Shown(html(input_bound(), {})).text


def test_environment_is_shown() -> None:
    profile = throttled()
    made, data = profile["made"], profile["data"]
    facts = [*made.values(), f"{data['path']}, {data['split']}", "12,811 images", "1.41 GB of shards", data["cache_why"]]
    for text in (plain(table(profile)), Shown(html(profile, {})).text):
        assert [fact for fact in facts if fact not in text] == []
    assert "planted" not in table(input_bound())


@pytest.mark.parametrize("example", EXAMPLES)
def test_lines_of_the_table_fit_a_terminal(example: Callable[[], Profile]) -> None:
    assert [line for line in table(example()).splitlines() if len(line) > WIDTH + 20 or line != line.rstrip()] == []


def test_report_escapes_what_it_is_given() -> None:
    profile = applied()
    for holder, name in (
        (profile["data"], "path"),
        (profile["made"], "command"),
        (profile["verdict"], "text"),
        (profile["verdict"], "change"),
        (profile["demand"], "what"),
        (profile["loaders"][-1], "error"),
        (profile["applied"], "change"),
    ):
        holder[name] = HOSTILE
    page = html(profile, {})
    assert "<script" not in page
    assert "script" not in Shown(page).tags
    assert Shown(page).text.count(plain(HOSTILE)) >= 7


def test_report_is_self_contained(tmp_path: Path) -> None:
    report = write_report(input_bound(), tmp_path / "new" / "folder")
    assert report == tmp_path / "new" / "folder" / "report.html"
    page = report.read_text(encoding="utf-8")
    found = Shown(page)
    assert len(found.references) == 3
    assert all(reference.startswith("data:image/png;base64,") for reference in found.references)
    assert not found.tags & {"script", "link", "iframe", "object"}
    assert "url(" not in page
    assert "@import" not in page
    assert sorted(file.name for file in report.parent.iterdir()) == ["report.html"]


def test_unwritable_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "file"))) as caught:
        write_report(input_bound(), tmp_path / "file")
    assert "\n" not in str(caught.value)
    (tmp_path / "report.html").mkdir()
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        write_report(input_bound(), tmp_path)
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]  # no partial files


def test_report_without_matplotlib_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tools.profiler.charts")
    monkeypatch.delattr("tools.profiler.charts", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"matplotlib is not installed; pip install -e '\.\[report\]'"):
        write_report(input_bound(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
