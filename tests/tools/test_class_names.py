"""Class names in tables, reports, weight headers and model cards."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from model import ARCHS
from model.loading import load_model
from model.weights import ModelConfig, load_weights, save_weights
from pipeline import LoaderSpec, ScaleJitter, open_loader
from tests.helpers import run_forked, run_script
from tools import report
from training.loaders import model_config_of
from training.options import TrainOptions

pytestmark = pytest.mark.usefixtures("one_core")

CLASSES = ["07", "n01440764", "n02012849"]
LABELS = ["<b>bus</b>, 07", "tench, n01440764", "crane, n02012849"]


@pytest.fixture(scope="module")
def named(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of two ImageNet classes without names in a file, and of another class with a name in classes.json."""
    folder = tmp_path_factory.mktemp("named")
    for split in ("train", "val"):
        for place, name in enumerate(CLASSES):
            shutil.copytree(image_folder / split / f"n{place:08d}", folder / "images" / split / name)
    (folder / "images" / "classes.json").write_text('{"07": "<b>bus</b>"}')
    result = run_script("tools/make_shards.py", folder / "images", "--out", folder / "data", "--profile", "original")
    assert result.returncode == 0, result.stderr
    return folder / "data"


def write_weights(path: Path, names: dict[str, str]) -> Path:
    torch.manual_seed(0)
    mean, std = np.full(3, 120, np.float32), np.full(3, 60, np.float32)
    config = ModelConfig("resnet20", CLASSES, 32, 40, mean, std, names)
    save_weights(path, ARCHS["resnet20"](num_classes=3).state_dict(), config.header())
    return path


@pytest.mark.slow
def test_tables_show_names(named: Path, tmp_path: Path) -> None:
    weights = write_weights(tmp_path / "model.safetensors", {})
    result = run_forked(
        "tools/evaluate.py", weights, "--data", named, "--save", tmp_path / "a.npz", "--per-class", tmp_path / "classes.csv",
        "--confusion", tmp_path / "confusion.csv",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert [row["class"] for row in csv.DictReader((tmp_path / "classes.csv").open())] == LABELS
    rows = list(csv.reader((tmp_path / "confusion.csv").open()))
    assert rows[0] == ["label \\ prediction", *LABELS]
    assert [row[0] for row in rows[1:]] == LABELS

    result = run_forked("tools/evaluate.py", tmp_path / "a.npz", "--per-class", tmp_path / "saved.csv")  # without the data
    assert result.returncode == 0, result.stderr
    assert [row["class"] for row in csv.DictReader((tmp_path / "saved.csv").open())] == ["07", *LABELS[1:]]


def test_reports_show_names(named: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    run.mkdir()
    write_weights(run / "model.safetensors", {})
    (run / "config.json").write_text(json.dumps({"arguments": {"data": str(named)}, "command": []}))
    (run / "metrics.csv").write_text("step,epoch,seconds,train_loss\n1,1,1,1\n")
    monkeypatch.setattr(sys, "argv", ["report.py", str(run), "--out", str(tmp_path / "report.html"), "--device", "cpu"])
    report.main()
    page = (tmp_path / "report.html").read_text()
    for label in ("&lt;b&gt;bus&lt;/b&gt;, 07", *LABELS[1:]):
        assert page.count(f'<th class="turned">{label}</th>') == 1
        assert page.count(f"<tr><th>{label}</th>") == 1
        assert f"<b>{label}</b> " in page  # an image's label
    assert "<b>bus" not in page


def test_weight_headers_have_the_names_of_the_data(named: Path, small_shards: Path) -> None:
    spec = LoaderSpec(str(named), batch_size=4, image_size=32, geometry=ScaleJitter(36, 40))
    config = model_config_of(TrainOptions(data=str(named)), open_loader(spec))
    assert config.class_names == {"07": "<b>bus</b>"}
    read = ModelConfig.from_header(config.header())
    assert read is not None
    assert (read.classes, read.class_names) == (CLASSES, config.class_names)
    spec = LoaderSpec(str(small_shards), batch_size=4, image_size=32, geometry=ScaleJitter(36, 40))
    header = model_config_of(TrainOptions(data=str(small_shards)), open_loader(spec)).header()
    assert list(header) == ["arch", "classes", "image_size", "eval_short", "mean", "std"]


def test_model_cards_show_names(tmp_path: Path) -> None:
    weights = write_weights(tmp_path / "model.safetensors", {"07": "<b>bus</b> | tram"})
    result = run_forked("tools/export.py", weights, "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    card = (tmp_path / "out" / "README.md").read_text()
    table = "| 0 | &lt;b&gt;bus&lt;/b&gt; \\| tram, 07 |\n| 1 | tench, n01440764 |\n| 2 | crane, n02012849 |\n\n</details>"
    assert f"<summary>3 classes</summary>\n\n| label | class |\n| --- | --- |\n{table}" in card
    assert json.loads((tmp_path / "out" / "config.json").read_text())["label_names"] == CLASSES
    config = load_model(tmp_path / "out", None, CLASSES)[1]
    assert config.class_names == {"07": "<b>bus</b> | tram"}
    assert "class_names" in load_weights(tmp_path / "out" / "model.safetensors")[1]
