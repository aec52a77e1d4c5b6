"""What a profile's figures become: the same strings in the terminal's table and in the report, and charts that can be read."""

from __future__ import annotations

import copy
import io
import itertools
import json
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image
from profiling import charts, figures
from profiling.html import html, write_report
from profiling.table import WIDTH, table

from pipeline.errors import UserError

Profile = dict[str, Any]
SCHEMA = json.loads((Path(__file__).parents[2] / "tools" / "profiling" / "schema.json").read_text())
HOSTILE = "/data/<script>alert(1)</script> & \"shards\" 'x'"


def speeds(images_per_s: float, spread: float = 0.021) -> Profile:
    return {"images_per_s": images_per_s, "low": images_per_s * (1 - spread), "high": images_per_s * (1 + spread)}


def stage(name: str, milliseconds: float, used: bool, ways: tuple[int, ...]) -> Profile:
    """A stage that slows down a little with more threads."""
    took = {threads: milliseconds * (1 + 0.03 * (threads - 1)) for threads in ways}
    at = [{"threads": n, **speeds(1e3 * n / took[n]), "ms_per_image": took[n]} for n in ways]
    return {"name": name, "used": used, "at": at}


def loader(engine: str, threads: int, prefetch: int, images_per_s: float, **others: Any) -> Profile:
    shares = {"cpu_share": min(threads / 2, 1.0) * 0.97, "gpu_share": None, "jpeg_share": None, "error": None}
    rest = {"bytes_per_s": images_per_s * 110_000, **shares, **others}
    return {"engine": engine, "threads": threads, "prefetch": prefetch, **speeds(images_per_s), **rest}


def failed(engine: str, threads: int, prefetch: int, error: str) -> Profile:
    names = ("images_per_s", "low", "high", "cpu_share", "bytes_per_s", "gpu_share", "jpeg_share")
    return {"engine": engine, "threads": threads, "prefetch": prefetch, **dict.fromkeys(names), "error": error}


def steps(count: int, waiting: float, computing: float) -> list[Profile]:
    """Seconds that a step waits (every third twice as long) and computes."""
    made, now = [], 0.0
    for place in range(count):
        got = now + waiting * (2 if place % 3 == 0 else 0.5)
        made.append({"asked": now, "got": got, "done": got + computing})
        now = got + computing + 0.0002
    return made


def demand(images_per_s: float, training: float, wait_share: float, **others: Any) -> Profile:
    step = 64 / training
    shares = {"wait_share": wait_share, "ready": 0.034, "cpu_share": 0.53, "gpu_share": None, "jpeg_share": None}
    window = steps(64, step * wait_share, step * (1 - wait_share))
    return {
        "what": "4,000 images/s",
        "emulated": True,
        **speeds(images_per_s, 0.004),
        "training": speeds(training, 0.013),
        **shares,
        "steps": window,
        **others,
    }


def input_bound() -> Profile:
    """Decoding in one thread of two: a full example, which the others below change."""
    others = [{"remedy": "profile", "change": "shards of --profile compact", "predicted_gain": 1.374}]
    return {
        "format": "cropfeed-profile",
        "version": 1,
        "made": {
            "date": "2026-05-12 14:03",
            "commit": "c31d0e5",
            "command": "tools/profile_pipeline.py /data/shards --threads 1 --demand 4000 --report out",
            "hardware": "AMD EPYC 9R14, 2 cores, 7.6 GiB",
            "versions": "Python 3.11.7, torch 2.11.0, numba 0.62.1",
            "planted": None,
        },
        "data": {
            "path": "/data/imagenet/lossless",
            "split": "train",
            "profile": "lossless",
            "images": 12_811,
            "bytes": 1_409_210_000,
            "mean_bytes": 110_004.2,
            "cache": "warm",
            "cache_why": "the shards (1.4 GB) fit into the memory available (5.1 GB)",
        },
        "spec": {
            "threads": 1,
            "prefetch": 4,
            "batch_size": 64,
            "image_size": 224,
            "geometry": "scale jitter 256..480",
            "dtype": "float32",
            "device": "cpu",
            "cores": 2,
        },
        "engine": "cpu",
        **speeds(2_038.4),
        "stages": [
            stage("read cold", 0.2213, False, (1, 2)),
            stage("read warm", 0.01134, True, (1, 2)),
            stage("cut", 0.0717, False, (1, 2)),
            stage("decode", 0.3301, True, (1, 2)),
            stage("resample", 0.0893, True, (1, 2)),
            stage("tail", 0.0412, True, (1, 2)),
            stage("assembly", 0.00312, True, (1,)),
        ],
        "loaders": [
            *(loader("cpu", n, p, 2_038.4 * n**0.96 * (1 - 0.02 / p)) for n in (1, 2) for p in (2, 4, 8)),
            *(failed("ffcv", n, 4, "ffcv is not installed") for n in (1, 2)),
        ],
        "storage": {"bytes_per_s": 1.913e9, "low": 1.87e9, "high": 1.95e9, "streams": 4, "cold_bytes_per_image": 131_072.0},
        "demand": demand(4_009.3, 1_987.6, 0.504),
        "ceilings": [
            {"name": "decoding", "images_per_s": 5_712.0, "why": "2 cores that do nothing but decode"},
            {"name": "storage", "images_per_s": 14_595.0, "why": "1.9 GB/s over 131 kB read for an image"},
        ],
        "verdict": {
            "text": "Training waits for its input half of its time: the loader gives 2,038 images/s, the model takes 4,009. "
            "What limits is decoding, 0.330 ms an image in the only thread, while one of the two cores idles. With --threads 2 "
            "training should become 1.91 times as fast.",
            "limit": "input",
            "stage": "decode",
            "remedy": "threads",
            "change": "--threads 2",
            "predicted_gain": 1.9142,
            "others": others,
        },
        "applied": None,
        "tuned": None,
        "ahead": None,
    }


def no_demand() -> Profile:
    return input_bound() | {"demand": None}


def compute_bound() -> Profile:
    """ResNet-50 on a CPU, which takes a fortieth of what the loader gives."""
    made = input_bound()
    made["demand"] = demand(50.93, 50.41, 0.0062, what="resnet50, bf16, batch 64, on cpu", emulated=False, ready=0.97)
    text = "The model takes 50.9 images/s, the loader gives 40 times that. Nothing about the input would make training faster."
    change = "--mixed-precision bf16"
    made["verdict"] |= {"text": text, "limit": "compute", "stage": "model", "remedy": "precision", "change": change}
    made["verdict"]["others"] = []
    return made


def throttled() -> Profile:
    """A cold page cache and a slow disk."""
    made = input_bound()
    made["stages"] = [stage("read cold", 5.612, True, (1, 2)), *made["stages"][1:]]
    made["stages"][1]["used"] = False
    made |= speeds(176.3, 0.08)
    made["loaders"] = [loader("cpu", n, p, 176.3 + n + p / 4) for n in (1, 2) for p in (2, 4)]
    made["storage"] |= {"bytes_per_s": 20.1e6, "low": 19.9e6, "high": 20.2e6}
    made["ceilings"] = [
        {"name": "decoding", "images_per_s": 5_712.0, "why": "2 cores that do nothing but decode"},
        {"name": "storage", "images_per_s": 182.7, "why": "20 MB/s over 110 kB"},
    ]
    made["demand"] = demand(4_009.3, 175.1, 0.956)
    text = "Training waits for the storage, which gives 20 MB/s: 183 images/s. A local cache would give 11.4 times that."
    made["verdict"] |= {"text": text, "stage": "read cold", "remedy": "cache", "change": "--cache /ssd", "predicted_gain": 11.43}
    made["made"]["planted"] = "a storage that gives 20 MB/s"
    made["data"] |= {"cache": "cold"}
    return made


def applied() -> Profile:
    gains = {"predicted_gain": 1.9142, "measured_gain": 1.8527, "low": 1.7913, "high": 1.9118, "error": None}
    return input_bound() | {"applied": {"remedy": "threads", "change": "--threads 2", **gains}}


def not_applied() -> Profile:
    gains = {"predicted_gain": 1.9142, "measured_gain": None, "low": None, "high": None, "error": "the cores are taken"}
    return input_bound() | {"applied": {"remedy": "threads", "change": "--threads 2", **gains}}


def tuned() -> Profile:
    found = {"threads": 2, "prefetch": 8, "images_per_s": 3_961.7, "seconds": 41.38, "file": "/home/me/cropfeed-tuned.json"}
    return input_bound() | {"tuned": found}


def ahead() -> Profile:
    needs = [
        {"name": "images/s", "unit": "images/s", "needed": 24_800.0, "here": 4_009.0, "why": "8 GPUs of 3,100 images/s"},
        {
            "name": "cores",
            "unit": "cores",
            "needed": 13.42,
            "here": 2.0,
            "why": "0.541 ms of a core an image, and what DALI leaves",
        },
        {"name": "storage", "unit": "bytes/s", "needed": 2.728e9, "here": 1.913e9, "why": "110 kB an image"},
        {"name": "memory", "unit": "bytes", "needed": 31.3e9, "here": 7.6e9, "why": "8 processes"},
        {"name": "network", "unit": "bytes/s", "needed": 2.9e9, "here": None, "why": "shards from a bucket"},
    ]
    text = "A host of 8 GPUs needs 13.4 cores and 2.7 GB/s; this machine has 2 cores, and it is these that break first."
    plan = {"gpus": 8, "hosts": 4, "demand": 3_100.0, "images_per_s": 99_200.0, "needs": needs, "breaks_first": "cores"}
    return input_bound() | {"ahead": plan | {"text": text}}


def compared() -> Profile:
    def row(name: str, data: str, speed: float | None, ratio: float | None, error: str | None = None) -> Profile:
        given = speeds(speed) if speed else {"images_per_s": None, "low": None, "high": None}
        return {"name": name, "data": data, **given, "ratio": ratio, "error": error}

    rows = [
        row("cropfeed-cpu-lossless", "lossless", 4_008.6, 3.8142),
        row("cropfeed-cpu-original", "original", 1_213.4, 1.1546),
        row("torchvision-v2", "original", 412.9, 0.3929),
        row("spdl", "original", 1_050.9, 1.0),
        row("dali-roi", "original", None, None, "DALI: pip install nvidia-dali-cuda130"),
        row("ffcv", "500", 1_712.3, 1.0),
    ]
    return input_bound() | {"rows": rows}


def on_a_gpu() -> Profile:
    """DALI with an H100, three engines, up to 64 threads; the stages of the CPU are not used."""
    made = input_bound()
    ways = (1, 2, 4, 8, 16, 32, 64)
    made["spec"] |= {"threads": 16, "prefetch": 3, "device": "cuda:0", "cores": 64, "batch_size": 256, "dtype": "bfloat16"}
    made["engine"] = "dali"
    made |= speeds(9_812.0)
    used = {"read warm": 0.0121, "cut": 0.0731, "copy": 0.00921}
    unused = {"read cold": 0.2213, "decode": 0.3301, "resample": 0.0893, "tail": 0.0412}
    order = ("read cold", "read warm", "cut", "decode", "resample", "tail", "copy")
    made["stages"] = [stage(name, (used | unused)[name], name in used, ways) for name in order]
    gpu = {"gpu_share": 0.713, "jpeg_share": 0.884, "cpu_share": 0.31}
    made["loaders"] = [
        *(loader("cpu", n, p, 2_000 * n**0.9 * (0.9 + p / 40)) for n in ways for p in (2, 4)),
        *(loader("dali", n, 3, 9_812.0 * min(1.0, (n / 16) ** 0.8) * (1 + n / 5_000), **gpu) for n in ways),
        *(loader("ffcv", n, 3, 1_900 * n**0.85) for n in ways),
        failed("dali", 128, 3, "CUDA out of memory"),
    ]
    made["ceilings"] = [
        {"name": "decoding", "images_per_s": 12_310.0, "why": "nvJPEG's hardware engine, 64 cores cutting"},
        {"name": "storage", "images_per_s": 14_595.0, "why": "1.9 GB/s"},
        {"name": "copy", "images_per_s": 105_431.0, "why": "PCIe"},
    ]
    made["demand"] = demand(3_098.0, 3_051.0, 0.0132, what="resnet50, bf16, batch 256, on an H100", emulated=False)
    made["demand"] |= {"gpu_share": 0.983, "jpeg_share": 0.271, "ready": None, "steps": steps(2_000, 0.0011, 0.0826)}
    text = "Training keeps up with the model to 1.3 %: nothing about the input limits it."
    made["verdict"] |= {"text": text, "limit": "balanced", "stage": "engine", "remedy": "none", "change": "nothing"}
    made["verdict"] |= {"predicted_gain": 1.0, "others": []}
    return made


def extreme() -> Profile:
    """Levels that coincide or lie far apart, one loader only, one step."""
    made = input_bound()
    made["loaders"] = [loader("cpu", 1, 4, 2_038.4), failed("dali", 1, 4, "no GPU")]
    made["ceilings"] = [{"name": name, "images_per_s": 2_040.0, "why": "as it is"} for name in ("decoding", "storage", "copy")]
    made["demand"] = demand(2_037.0, 2_030.0, 0.0, steps=[{"asked": 0.0, "got": 0.0, "done": 31.2}])
    return made


def far_apart() -> Profile:
    made = input_bound()
    made["stages"][3] = stage("decode", 8_213.0, True, (1, 2))
    made["demand"] = demand(2_511_000.0, 0.0314, 0.9999, steps=steps(7, 2_000.0, 1e-5))
    made |= speeds(0.1222, 0.9)
    made["loaders"] = [loader("cpu", n, 4, 0.1222 * n) for n in range(1, 9)]
    return made


def nothing_measured() -> Profile:
    made = no_demand()
    return made | {"loaders": [failed("cpu", 1, 4, "no memory")], "ceilings": []}


EXAMPLES: list[Callable[[], Profile]] = [
    input_bound,
    no_demand,
    compute_bound,
    throttled,
    applied,
    not_applied,
    tuned,
    ahead,
    compared,
    on_a_gpu,
    extreme,
    far_apart,
    nothing_measured,
]


class Shown(HTMLParser):
    """The report's text, its table rows, and what it refers to."""

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
        if tag == "tr":
            self.rows.append("")

    def handle_endtag(self, tag: str) -> None:
        self.hidden = False

    def handle_data(self, data: str) -> None:
        if not self.hidden and data.strip():
            self.texts.append(data)
            if self.rows:
                self.rows[-1] += f" {data}"

    @property
    def text(self) -> str:
        return plain(" ".join(self.texts))


def plain(text: str) -> str:
    return " ".join(text.split())


def shown(text: str, line: str) -> bool:
    """Whether a figure stands in a line, not merely as a part of a longer one."""
    return re.search(rf"(?<![\w.,]){re.escape(text)}(?![\w]|[.,]\d)", line) is not None


def assert_row(profile: Profile, *texts: str) -> None:
    """That one line of the table, and one row of the report, holds all of these."""
    for kind, lines in (("table", table(profile).splitlines()), ("HTML", Shown(html(profile, {})).rows)):
        assert any(all(shown(text, plain(line)) for text in texts) for line in lines), f"{kind}: no row with {texts}"


def spread(given: Profile) -> tuple[str, str]:
    return figures.speed(given["images_per_s"]), figures.interval(given["low"], given["high"])


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_are_what_the_schema_says(example: Callable[[], Profile]) -> None:
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
def test_how_figures_are_written(made: str, text: str) -> None:
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


def test_without_demand_none_is_claimed() -> None:
    for text in (table(no_demand()), Shown(html(no_demand(), {})).text):
        assert "No demand was measured" in text
        assert "waiting" not in text
        assert "train step alone" not in text


def test_remedy_tried_is_shown_with_its_prediction() -> None:
    assert_row(applied(), "--threads 2", "1.91 ×", "1.85 ×", "1.79 × to 1.91 ×")
    page = Shown(html(applied(), {})).text
    assert "1.91 × predicted, 1.85 × measured (1.79 × to 1.91 ×)" in page
    assert "measured (" not in Shown(html(input_bound(), {})).text
    assert_row(not_applied(), "--threads 2 (not tried: the cores are taken)", "1.91 ×")
    other = applied()
    other["applied"]["change"] = "--threads 4"  # another than the verdict's gets a row of its own
    assert_row(other, "--threads 4", "1.85 ×")
    assert not any("--threads 2" in line and "1.85 ×" in line for line in table(other).splitlines())


def test_tuned_ahead_and_rows_are_shown_where_present() -> None:
    assert_row(tuned(), "2", "8", "3,962", "41.4 s")
    assert "/home/me/cropfeed-tuned.json" in Shown(html(tuned(), {})).text
    assert "/home/me/cropfeed-tuned.json" in table(tuned())
    for need in ahead()["ahead"]["needs"]:
        needed, here = (figures.amount(need[name], need["unit"]) for name in ("needed", "here"))
        assert_row(ahead(), need["name"], needed, here, figures.gain(need["needed"] / need["here"]) if need["here"] else "–")
    for text in (plain(table(ahead())), Shown(html(ahead(), {})).text):
        assert ahead()["ahead"]["text"] in text
        assert "4 hosts of 8 GPUs, 3,100 images/s each, 99,200 in all" in text
        assert text.count("breaks first: 0.541 ms of a core") == 1
    for row in compared()["rows"]:
        if row["error"]:
            assert_row(compared(), row["name"], row["data"], "not measured: " + row["error"])
        else:
            assert_row(compared(), row["name"], row["data"], *spread(row), figures.gain(row["ratio"]))
    order = [row["name"] for row in compared()["rows"]]
    lines = [line.split()[0] for line in table(compared()).splitlines() if line.split() and line.split()[0] in order]
    lines = lines[-len(order) :]  # ffcv is the name of a loader, too
    assert lines == ["cropfeed-cpu-lossless", "cropfeed-cpu-original", "spdl", "torchvision-v2", "dali-roi", "ffcv"]
    for title in ("Tuned", "Ahead", "Peers"):
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
    profile = compared()
    for holder, name in (
        (profile["data"], "path"),
        (profile["made"], "command"),
        (profile["verdict"], "text"),
        (profile["verdict"], "change"),
        (profile["demand"], "what"),
        (profile["loaders"][-1], "error"),
        (profile["rows"][0], "name"),
    ):
        holder[name] = HOSTILE
    page = html(profile, {})
    assert "<script" not in page
    assert "script" not in Shown(page).tags
    assert Shown(page).text.count(plain(HOSTILE)) >= 7


def test_report_needs_nothing_else(tmp_path: Path) -> None:
    report = write_report(input_bound(), tmp_path / "new" / "folder")
    assert report == tmp_path / "new" / "folder" / "report.html"
    page = report.read_text(encoding="utf-8")
    found = Shown(page)
    assert len(found.references) == 3
    assert all(reference.startswith("data:image/png;base64,") for reference in found.references)
    assert not found.tags & {"script", "link", "iframe", "object"}
    assert "url(" not in page
    assert "@import" not in page
    assert sorted(file.name for file in report.parent.iterdir()) == ["report.html", "stages.png", "threads.png", "timeline.png"]


def test_timeline_of_an_earlier_report_goes(tmp_path: Path) -> None:
    write_report(input_bound(), tmp_path)
    write_report(no_demand(), tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["report.html", "stages.png", "threads.png"]


def test_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "file"))) as caught:
        write_report(input_bound(), tmp_path / "file")
    assert "\n" not in str(caught.value)
    (tmp_path / "report.html").mkdir()
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        write_report(input_bound(), tmp_path)
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]  # no halves


def test_report_without_matplotlib_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "profiling.charts")
    monkeypatch.delattr("profiling.charts", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"matplotlib is not installed; pip install -e '\.\[dev\]'"):
        write_report(input_bound(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("example", EXAMPLES)
def test_no_texts_of_the_charts_overlap(example: Callable[[], Profile], monkeypatch: pytest.MonkeyPatch) -> None:
    profile = example()
    before = copy.deepcopy(profile)
    drawn = charts.figures(profile)
    assert sorted(drawn) == ["stages", "threads", *(["timeline"] if profile["demand"] else [])]
    assert profile == before
    for name, figure in drawn.items():
        boxes = texts(figure, monkeypatch)
        assert len(boxes) >= 5
        page = figure.bbox
        outside = [text for text, box in boxes if not (page.contains(*box.min) and page.contains(*box.max))]
        assert outside == [], name
        # A pixel of each box is the empty margin above and below letters.
        overlap = [(one, other) for (one, a), (other, b) in itertools.combinations(boxes, 2) if a.padded(-0.5).overlaps(b)]
        assert overlap == [], name


@pytest.mark.parametrize("example", [input_bound, no_demand, far_apart])
def test_charts_are_png_files(example: Callable[[], Profile]) -> None:
    pngs = charts.draw(example())
    assert len(pngs) == (3 if example()["demand"] else 2)
    for png in pngs.values():
        with Image.open(io.BytesIO(png)) as picture:
            picture.load()
            assert picture.format == "PNG"
            assert picture.width == 1400
            assert 350 <= picture.height <= 1400
            assert len(np.unique(np.asarray(picture.convert("L")))) > 20  # not blank


def texts(figure: Figure, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Bbox]]:
    """Every text that is drawn, with the pixels it covers. Ticks outside an axis exist as texts, but are not drawn."""
    drawn: list[Text] = []
    draw = Text.draw

    def noted(text: Text, renderer: Any) -> None:
        if text.get_visible() and text.get_text().strip():
            drawn.append(text)
        draw(text, renderer)

    with monkeypatch.context() as patch:
        patch.setattr(Text, "draw", noted)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    return [(text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in drawn]


def rectangles(figure: Figure) -> list[Rectangle]:
    return [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]


def test_waterfall_adds_up_what_is_used() -> None:
    """Bars begin where the last used one ended; the whole loader's is as long as its speed says."""
    profile = input_bound()
    bars = [(bar.get_x(), bar.get_width(), bool(bar.get_hatch())) for bar in rectangles(charts.stages(profile))]
    reached = 0.0
    for stage, (start, width, hatched) in zip(profile["stages"], bars[:-1], strict=True):
        assert start == pytest.approx(reached)
        assert hatched != stage["used"]
        assert width == pytest.approx(stage["at"][0]["ms_per_image"], abs=0.003)
        reached += stage["at"][0]["ms_per_image"] if stage["used"] else 0.0
    assert bars[-1][:2] == pytest.approx((0.0, 1e3 / 2_038.4))


def test_timeline_shows_all_of_the_window_in_its_proportions() -> None:
    profile = input_bound()
    waited = sum(step["got"] - step["asked"] for step in profile["demand"]["steps"])
    computed = sum(step["done"] - step["got"] for step in profile["demand"]["steps"])
    drawn = {"waiting": 0.0, "computing": 0.0}
    for bar in rectangles(charts.timeline(profile)):
        red, _, blue, _ = to_rgba(bar.get_facecolor())
        drawn["waiting" if red > blue else "computing"] += bar.get_width()
    assert drawn == pytest.approx({"waiting": waited, "computing": computed})


def test_best_prefetch_of_each_thread_count_is_drawn() -> None:
    best = charts.best_loaders(input_bound())
    assert list(best) == ["cpu"]  # ffcv failed
    assert [(point["threads"], point["prefetch"]) for point in best["cpu"]] == [(1, 8), (2, 8)]
    assert next(iter(charts.best_loaders(on_a_gpu()))) == "dali"
