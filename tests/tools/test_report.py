"""The report on runs: valid HTML, and figures, curves and worst images compared with Pillow, plain torch and NumPy."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from PIL import Image

from model import ARCHS, ResNet
from model.testing import Accuracy
from model.weights import ModelConfig, save_weights
from pipeline.errors import UserError
from pipeline.plan import sampling
from pipeline.store.shards import Manifest, ShardSet
from tests.helpers import run_forked
from tools import report
from tools.reporting import curves, page, runs, worst
from tools.reporting.evaluation import EvaluateOptions
from tools.reporting.worst import RunEvaluation, WorstImage
from training.metrics import COLUMNS

pytestmark = pytest.mark.usefixtures("one_core")

HOSTILE = "<script>alert('x')</script> & \"a\""
VOID = {"meta", "img", "br"}
SHORT, SIZE = 40, 32
STD = 30.0


def accuracy_of(confusion: torch.Tensor) -> Accuracy:
    images, correct = confusion.sum(dim=1), confusion.diagonal()
    return Accuracy(images, correct, torch.minimum(correct + 1, images), confusion)


class Page(HTMLParser):
    """Parses a page. Fails for mismatched tags and for references to anything outside the page."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.ids: list[str] = []
        self.referenced: set[str] = set()  # ids in links and url()
        self.images: list[tuple[str, bytes]] = []  # alt, content
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        assert tag not in ("script", "link", "iframe", "object", "image", "a")
        for name, value in attrs:
            assert name not in ("srcset", "xlink:href", "xmlns")
            assert not name.startswith("on")
            text = value or ""
            if name == "src":
                kind, _, content = text.partition(";base64,")
                assert kind == "data:image/jpeg"
                self.images.append((str(dict(attrs)["alt"]), base64.b64decode(content, validate=True)))
                continue
            if name == "href":
                assert text.startswith("#")
                self.referenced.add(text[1:])
            if name == "id":
                self.ids.append(text)
            if name not in ("alt", "aria-label"):
                assert "http" not in text
                for target in re.findall(r"url\((.*?)\)", text):
                    assert target.startswith("#")
                    self.referenced.add(target[1:])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            assert not re.search(r"@import|url\(|http", data)
        else:
            self.text += data + " "


def read(content: str) -> Page:
    assert content.startswith("<!DOCTYPE html>")
    parsed = Page()
    parsed.feed(content)
    parsed.close()
    assert not parsed.open
    assert len(parsed.ids) == len(set(parsed.ids))
    assert parsed.referenced <= set(parsed.ids)
    parsed.text = " ".join(parsed.text.split())
    return parsed


def row(step: int, seconds: float, **figures: float) -> dict[str, Any]:
    return {"step": step, "epoch": step / 10, "seconds": seconds, **figures}


def logged(step: int, seconds: float, speed: float = 200, wait: float = 0.01) -> dict[str, Any]:
    loss, rate = 3 / (1 + step), 0.1 - step / 1000
    figures = {"lr": rate, "train_loss": loss, "train_top1": step / 60, "images_per_s": speed, "wait_share": wait}
    return row(step, seconds, **figures)


ROWS = (
    logged(5, 60, speed=100, wait=0.4),
    logged(10, 90),
    row(10, 96, val_top1=0.52, val_top5=0.9),
    logged(15, 126, speed=400, wait=0.02),
    row(20, 150, val_top1=0.71, val_top5=0.95),
    row(30, 180, val_top1=0.64, val_top5=0.93),
)
ARGUMENTS = {"arch": "resnet20", "epochs": 3, "iterations": None, "image_size": SIZE, "batch_size": 24}


def make_run(folder: Path, rows: Any = ROWS, arguments: dict[str, Any] | None = None, **config: Any) -> Path:
    folder.mkdir(parents=True)
    with (folder / "metrics.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    content = {"command": ["train.py"], "arguments": ARGUMENTS | (arguments or {}), "processes": 2, "engine": "cpu", **config}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def make_weights(path: Path, classes: list[str], seed: int = 0) -> ResNet:
    """Save a model with random weights. Its classifier has large weights, so that predictions differ between images."""
    torch.manual_seed(seed)
    model = ARCHS["resnet20"](num_classes=len(classes))
    with torch.no_grad():
        model.fc.weight.normal_(0, 1)
        model.fc.bias.zero_()
    path.parent.mkdir(parents=True, exist_ok=True)
    config = ModelConfig("resnet20", classes, SIZE, SHORT, np.full(3, 120, np.float32), np.full(3, STD, np.float32))
    save_weights(path, model.state_dict(), config.header())
    return model.eval()


@pytest.fixture
def make_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Page]:
    def make(*words: Any) -> Page:
        out = tmp_path / "out" / "report.html"
        monkeypatch.setattr(sys, "argv", ["report.py", *map(str, words), "--out", str(out)])
        report.main()
        assert list(out.parent.iterdir()) == [out]
        return read(out.read_text(encoding="utf-8"))

    return make


def crop(path: Path) -> np.ndarray:
    """The central crop of the image resized to short side SHORT, made by Pillow: uint8 (SIZE, SIZE, 3)."""
    image = Image.open(path).convert("RGB")
    scale = SHORT / min(image.size)
    width, height = (math.floor(side * scale + 0.5) for side in image.size)
    left, top = (width - SIZE) // 2, (height - SIZE) // 2
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized.crop((left, top, left + SIZE, top + SIZE)))


def plain_evaluation(
    model: ResNet, folder: Path, classes: list[str], flip: bool
) -> dict[str, tuple[int, np.ndarray, np.ndarray]]:
    """Key -> label, probabilities (classes,) and crop of every validation image, computed with Pillow and torch.

    flip: average the probabilities with those of the mirror image.
    """
    found = {}
    for label, name in enumerate(classes):
        for path in sorted((folder / "val" / name).iterdir()):
            pixels = crop(path)
            images = torch.from_numpy((pixels.astype(np.float32) - 120) / STD).permute(2, 0, 1)[None]
            with torch.inference_mode():
                both = torch.cat([images, images.flip(3)]) if flip else images
                found[f"{name}/{path.stem}"] = label, model(both).softmax(1).mean(0).numpy(), pixels
    return found


def test_worst_images_equal_a_plain_evaluation(
    small_shards: Path, image_folder: Path, tmp_path: Path, make_page: Callable[..., Page]
) -> None:
    classes = Manifest(small_shards).classes
    models = {}
    for seed, name in enumerate("ab"):
        folder = make_run(tmp_path / name, arguments={"flip_test": name == "b"})
        models[name] = make_weights(folder / "model.safetensors", classes, seed)
    options = EvaluateOptions(data=str(small_shards), batch_size=8, device="cpu")
    found = worst.evaluate_runs(runs.read_runs([tmp_path / "a", tmp_path / "b"]), options, worst=5)
    for name, model in models.items():
        plain, result = plain_evaluation(model, image_folder, classes, name == "b"), found[name]
        assert isinstance(result, RunEvaluation)
        truth = {key: probabilities[label] for key, (label, probabilities, _) in plain.items()}
        lowest = sorted(truth.values())[:5]
        assert max(truth.values()) > lowest[-1] + 0.2  # the worst ones differ from the best
        assert [one.label_probability for one in result.worst] == pytest.approx(lowest, abs=0.03)
        assert len({one.id for one in result.worst}) == 5
        for one in result.worst:
            label, probabilities, pixels = plain[one.key]
            assert one.label == label
            assert one.label_probability == pytest.approx(truth[one.key], abs=0.03)
            assert one.prediction_probability == pytest.approx(probabilities[one.prediction], abs=0.03)
            assert one.prediction_probability == pytest.approx(probabilities.max(), abs=0.03)
            assert np.abs(one.pixels.astype(int) - pixels).mean() < 2
        certain = [(label, p) for label, p, _ in plain.values() if np.diff(np.sort(p))[-1] > 0.06]
        matrix = np.zeros((3, 3), int)
        for label, probabilities in certain:
            matrix[label, probabilities.argmax()] += 1
        assert result.accuracy.confusion is not None
        difference = result.accuracy.confusion.numpy() - matrix
        assert (difference >= 0).all()
        assert difference.sum() == len(plain) - len(certain)
        assert len(certain) > 0.7 * len(plain)
        assert result.accuracy.confusion.sum(dim=1).tolist() == [7, 7, 7]

    parsed = make_page(tmp_path / "a", tmp_path / "b", "--data", small_shards, "--worst", 5)
    shown = found["a"]
    assert isinstance(shown, RunEvaluation)
    assert [alt for alt, _ in parsed.images[:5]] == [one.key for one in shown.worst]
    for (_, content), one in zip(parsed.images, shown.worst, strict=False):
        image = Image.open(io.BytesIO(content))
        assert image.format == "JPEG"
        assert np.abs(np.asarray(image).astype(int) - one.pixels).mean() < 8
        assert f"{one.id}: {one.key}" in parsed.text
    assert len(parsed.images) == 10
    assert f"top-1 {100 * shown.accuracy.top1_rate:.2f} %" in parsed.text
    assert shown.accuracy.confusion is not None
    for name, counts in zip(classes, shown.accuracy.confusion.tolist(), strict=True):
        assert f"{name} {' '.join(str(count) for count in counts if count)} " in parsed.text


def test_the_first_crops_of_a_training_are_those_of_its_plan(finished: Path, small_shards: Path) -> None:
    (run,) = runs.read_runs([finished])
    shown = worst.training_images(run, str(small_shards), ["zero", "one", "two"], EvaluateOptions(data=str(small_shards)), 5)
    assert [one.id for one in shown] == sampling.order(run.argument("seed"), 0, np.arange(5), 60).tolist()
    labels = ShardSet(small_shards, "train").samples["label"]
    assert [one.name for one in shown] == [["zero", "one", "two"][labels[one.id]] for one in shown]
    side = run.argument("image_size")
    assert {one.pixels.shape for one in shown} == {(side, side, 3)}


def test_weights_are_the_final_ones_or_those_of_the_best_checkpoint(small_shards: Path, tmp_path: Path) -> None:
    classes, folder = Manifest(small_shards).classes, make_run(tmp_path / "a", arguments={"data": str(small_shards)})

    def evaluated() -> Any:
        return worst.evaluate_runs(runs.read_runs([folder]), EvaluateOptions(device="cpu"), worst=16)["a"]

    assert "no weights yet" in evaluated()
    for name in ("checkpoints/last", "checkpoints/best", "."):
        make_weights(folder / name / "model.safetensors", classes)
        assert evaluated().weights == str(Path(name) / "model.safetensors")
    model = make_weights(folder / "model.safetensors", classes)
    state = model.state_dict()
    state["fc.bias"][0] = math.nan
    config = ModelConfig("resnet20", classes, SIZE, SHORT, np.full(3, 120, np.float32), np.ones(3, np.float32))
    save_weights(folder / "model.safetensors", state, config.header())
    assert "diverged" in evaluated()
    make_weights(folder / "model.safetensors", ["x", "y", "z"])
    assert "classes differ from the" in evaluated()


def test_other_runs_are_evaluated_if_one_cannot_be(small_shards: Path, tmp_path: Path) -> None:
    classes = Manifest(small_shards).classes
    for name, data in (("a", tmp_path / "none"), ("b", small_shards), ("c", None)):
        folder = make_run(tmp_path / name, arguments={"data": data and str(data)})
        make_weights(folder / "model.safetensors", classes)
    found = worst.evaluate_runs(runs.read_runs([tmp_path / name for name in "abc"]), EvaluateOptions(device="cpu"), worst=1)
    assert isinstance(found["b"], RunEvaluation)
    assert "no such folder" in str(found["a"])
    assert "--data" in str(found["c"])
    text = read(
        page.html(runs.read_runs([tmp_path / "a", tmp_path / "c"]), [], {"a": HOSTILE, "c": found["c"]}, "val", "today")
    ).text
    assert f"Not evaluated: {HOSTILE}" in text
    with pytest.raises(UserError, match="no such CUDA GPU"):
        worst.evaluate_runs(runs.read_runs([tmp_path / "b"]), EvaluateOptions(device="cuda:9"), worst=1)


def test_table_of_the_runs(tmp_path: Path, make_page: Callable[..., Page]) -> None:
    more: dict[str, Any] = {"precision": "bf16", "commit": "0123456789abcdef", "hardware": {"cores": 2}, "versions": "torch 9"}
    make_run(tmp_path / "a", **more)
    make_run(tmp_path / "b", ROWS[:3], {"epochs": 9, "start_size": 24})
    make_run(tmp_path / "bare", [])
    (tmp_path / "bare" / "config.json").write_text("{}")
    parsed = make_page(tmp_path / "a", tmp_path / "b", tmp_path / "bare", "--no-evaluate")
    logs = [one for one in ROWS if "lr" in one]
    times = [1 / one["images_per_s"] for one in logs]
    waiting = sum(time * one["wait_share"] for time, one in zip(times, logs, strict=True)) / sum(times)
    speed = median(one["images_per_s"] for one in logs)
    first = f"a resnet20 3 32 24 64.00 % 71.00 % (2) 93.00 % 3.00 {speed:.0f} {100 * waiting:.0f} % bf16 2 cpu 0123456789ab"
    assert first in parsed.text
    assert "b resnet20 1 of 9 24 → 32 24 52.00 % 52.00 % (1) 90.00 % 1.60" in parsed.text
    assert "bare " + " ".join("–" * 14) in parsed.text
    assert "hardware: cores 2" in parsed.text
    assert "versions: torch 9" in parsed.text
    assert "errors of the model" not in parsed.text
    assert not parsed.images


def test_curves_show_the_rows(tmp_path: Path) -> None:
    some_runs = runs.read_runs([make_run(tmp_path / name, ROWS[:count]) for name, count in (("a", 6), ("b", 3))])
    drawn = {(chart.y, chart.x): curves.figure_of(chart, some_runs).axes[0] for chart in curves.CHARTS}
    assert len(drawn) == len(curves.CHARTS)
    for (y, x), factor in {("val_top1", "epoch"): 1.0, ("val_top1", "seconds"): 1 / 60}.items():
        lines = drawn[y, x].lines
        assert [to_hex(line.get_color()) for line in lines] == [shade for shade, _ in curves.COLOURS[:2] for _ in range(2)]
        for line, count, column in zip(lines, (6, 6, 3, 3), ("train_top1", y, "train_top1", y), strict=True):
            expected = [(factor * one[x], 100 * one[column]) for one in ROWS[:count] if column in one]
            np.testing.assert_allclose(np.array(line.get_data()).T, expected)
    for column, factor in {"train_loss": 1.0, "lr": 1.0, "images_per_s": 1.0, "wait_share": 100.0}.items():
        for line, count in zip(drawn[column, "epoch"].lines, (6, 3), strict=True):
            expected = [(one["epoch"], factor * one[column]) for one in ROWS[:count] if column in one]
            np.testing.assert_allclose(np.array(line.get_data()).T, expected)
    assert drawn["wait_share", "epoch"].get_ylim()[1] < 10  # without the first row: its 40 % include the loader's start


def test_a_run_has_one_colour_everywhere(tmp_path: Path) -> None:
    some_runs = runs.read_runs([make_run(tmp_path / f"run{place}") for place in range(8)])
    charts = curves.draw(some_runs)
    for chart, svg in charts:
        for place in range(6):
            strokes = svg.count(f"stroke: var(--run-{place})")
            assert strokes >= (2 if place < 2 else 1), chart
        assert not re.search("#[0-9a-f]{6}", svg)  # all colours are variables
    content = page.html(some_runs, charts, {}, "val", "today")
    read(content)
    for place in range(8):
        name = re.search(rf'stroke="([^"]+)"[^<]*/></svg>run{place}</td>', content)
        assert name
        assert name[1] == f"var(--run-{place % 6})"
    assert len({page.key(place) for place in range(8)}) == 8
    dashes = [line.get_linestyle() for line in curves.figure_of(curves.CHARTS[0], some_runs).axes[0].lines]
    assert dashes[:6] == ["-"] * 6
    assert "-" not in dashes[6:]


def test_long_curves_are_thinned_without_bias() -> None:
    rng = np.random.default_rng(0)
    x, speed = np.arange(1.0, 1001.0), rng.uniform(50, 500, 1000)
    thin_x, thin_speed = curves.thinned(x, speed, 1 / speed)
    assert 100 < len(thin_x) <= curves.MAX_POINTS
    assert (np.diff(thin_x) > 0).all()
    size = math.ceil(1000 / curves.MAX_POINTS)
    for place in (0, 5, len(thin_x) - 1):
        part = speed[place * size : (place + 1) * size]
        assert thin_speed[place] == pytest.approx(len(part) / (1 / part).sum())  # images over seconds
    _, plain = curves.thinned(x, speed)
    assert plain[3] == pytest.approx(speed[3 * size : 4 * size].mean())
    np.testing.assert_array_equal(curves.thinned(x[:150], speed[:150])[1], speed[:150])


def test_many_classes_are_shown_as_pairs(tmp_path: Path) -> None:
    classes = [f"c{number:02}" for number in range(25)]
    confusion = np.random.default_rng(0).permutation(625).reshape(25, 25)
    accuracy = accuracy_of(torch.from_numpy(confusion))
    run = runs.read_run(make_run(tmp_path / "a"), "a")
    parsed = read(
        page.html([run], [], {"a": RunEvaluation("model.safetensors", "x", "centre", classes, accuracy, [])}, "val", "today")
    )
    wrong = sorted(((confusion[i, j], i, j) for i in range(25) for j in range(25) if i != j), reverse=True)
    expected = [f"{classes[i]} {classes[j]} {n} {page.share(n / confusion[i].sum())}" for n, i, j in wrong[: page.PAIRS]]
    assert " ".join(expected) in parsed.text
    assert f"{classes[wrong[page.PAIRS][1]]} {classes[wrong[page.PAIRS][2]]} {wrong[page.PAIRS][0]} " not in parsed.text
    assert "every image is classified correctly" in "".join(page.pairs(torch.eye(25, dtype=torch.int64), classes))


def test_text_from_outside_is_escaped(tmp_path: Path) -> None:
    folder = make_run(
        tmp_path / HOSTILE.replace("/", ""), arguments={"arch": HOSTILE}, commit=HOSTILE, versions=HOSTILE, engine=HOSTILE
    )
    (run,) = runs.read_runs([folder])
    accuracy = accuracy_of(torch.tensor([[1, 2], [3, 4]]))
    worst_image = WorstImage(7, HOSTILE, 0, 1, 0.00001, 0.9, np.zeros((4, 4, 3), np.uint8))
    found = RunEvaluation("model.safetensors", HOSTILE, "centre", [HOSTILE, "b"], accuracy, [worst_image])
    content = page.html([run], curves.draw([run]), {run.name: found}, HOSTILE, "today")
    parsed = read(content)
    assert parsed.tags["script"] == 0
    assert parsed.tags["td"] > 10
    assert "<script>" not in content
    for text in (HOSTILE, f"7: {HOSTILE}", f"versions: {HOSTILE}", run.name):
        assert text in parsed.text
    assert parsed.images[0][0] == HOSTILE
    assert "< 0.01 %" in parsed.text.replace("\N{NO-BREAK SPACE}", " ")


def test_runs_still_training(tmp_path: Path, make_page: Callable[..., Page]) -> None:
    begun = make_run(tmp_path / "begun", [])
    assert "No run has logged any figures yet" in make_page(begun, "--no-evaluate").text
    early = make_run(tmp_path / "early", ROWS[:2])
    with (early / "metrics.csv").open("a") as stream:
        stream.write("20,2.0,13")  # being written
    parsed = make_page(begun, early, "--no-evaluate")
    assert "early resnet20 1 of 3 32 24 – – – 1.50" in parsed.text
    assert "Top-1, % (pale: training), against minutes" in parsed.text  # the accuracy of training alone
    assert "Minutes (epochs) to a top-1 of" not in parsed.text


def test_runs_are_named_apart(tmp_path: Path) -> None:
    places = [make_run(tmp_path / name) for name in ("x/seed0", "y/seed0", "z")]
    (tmp_path / "latest").symlink_to("z")
    assert [run.name for run in runs.read_runs([*places, tmp_path / "latest"])] == ["x/seed0", "y/seed0", "z"]


def test_bad_input_is_refused(tmp_path: Path, make_page: Callable[..., Page]) -> None:
    good = make_run(tmp_path / "good")
    make_page(good, "--no-evaluate")
    before = (tmp_path / "out" / "report.html").read_bytes()
    with pytest.raises(UserError, match=f"^{tmp_path}: no run there"):
        make_page(good, tmp_path, "--no-evaluate")
    for name, content in (
        ("config.json", "{"),
        ("config.json", "[]"),
        ("metrics.csv", "step,epoch\n1,x\n"),
        ("metrics.csv", "a\n1\n"),
    ):
        bad = make_run(tmp_path / f"bad{len(content)}{name}")
        (bad / name).write_text(content)
        with pytest.raises(UserError, match=f"^{bad / name}: is damaged"):
            make_page(good, bad, "--no-evaluate")
    assert (tmp_path / "out" / "report.html").read_bytes() == before


@pytest.mark.slow
def test_as_a_script(tmp_path: Path) -> None:
    result = run_forked("tools/report.py", make_run(tmp_path / "a"), "--no-evaluate", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "report.html written\n"
    read((tmp_path / "report.html").read_text())
