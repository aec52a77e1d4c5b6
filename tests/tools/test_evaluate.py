from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from model import ARCHS
from model.weights import load_weights
from tests.helpers import assert_refused, run_forked

pytestmark = pytest.mark.usefixtures("one_core")


@pytest.fixture(scope="module")
def run(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    result = run_forked(
        "train.py", "--data", small_shards, "--output", folder, "--arch", "resnet18", "--epochs", 3, "--batch-size", 12,
        "--image-size", 56, "--mean", "channel", "--lr", 0.02, "--threads", 1, "--log-every", 2,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return folder


def plain_predictions(run: Path, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Ranked classes (N, 3) and labels (N,) of the validation images, computed with Pillow and torch."""
    model = ARCHS["resnet18"](num_classes=3)
    model.load_state_dict(load_file(run / "model.safetensors"))
    model.eval()
    mean = np.mean(
        [np.asarray(centre(path, 256, 224)).mean(axis=(0, 1)) for path in sorted((folder / "train").glob("*/*"))], axis=0
    )
    images, labels = [], []
    for label, name in enumerate(sorted(path.name for path in (folder / "val").iterdir())):
        for path in sorted((folder / "val" / name).iterdir()):
            images.append(np.asarray(centre(path, 64, 56), np.float32) - mean)
            labels.append(label)
    with torch.inference_mode():
        logits = model(torch.from_numpy(np.stack(images)).float().permute(0, 3, 1, 2))
    return logits.argsort(dim=1, descending=True).numpy(), np.array(labels)


def centre(path: Path, short: int, crop: int) -> Image.Image:
    image = Image.open(path).convert("RGB")
    scale = short / min(image.size)
    width, height = (int(side * scale + 0.5) for side in image.size)
    left, top = (width - crop) // 2, (height - crop) // 2
    return image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + crop, top + crop))


def test_figures_equal_a_plain_evaluation(image_folder: Path, small_shards: Path, run: Path, tmp_path: Path) -> None:
    result = run_forked(
        "tools/evaluate.py", run, "--data", small_shards, "--json", tmp_path / "figures.json",
        "--per-class", tmp_path / "classes.csv", "--confusion", tmp_path / "confusion.csv", "--batch-size", 5,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    ranked, labels = plain_predictions(run, image_folder)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["images"] == 21
    assert figures["top5"] == 1.0  # three classes
    assert abs(figures["top1"] - (ranked[:, 0] == labels).mean()) < 1.5 / 21  # resampling may change one prediction
    confusion = np.array([row[1:] for row in list(csv.reader((tmp_path / "confusion.csv").open()))[1:]], int)
    assert confusion.sum(axis=1).tolist() == [7, 7, 7]
    assert np.trace(confusion) == round(figures["top1"] * 21)
    expected = np.zeros((3, 3), int)
    np.add.at(expected, (labels, ranked[:, 0]), 1)
    assert np.abs(confusion - expected).sum() <= 2
    rows = list(csv.DictReader((tmp_path / "classes.csv").open()))
    assert [row["class"] for row in rows] == ["n00000000", "n00000001", "n00000002"]
    assert [float(row["top1"]) for row in rows] == pytest.approx((np.diag(confusion) / 7).tolist())
    assert f"top-1 {figures['top1']:.2%}" in result.stdout


def test_figures_agree_with_training_and_checkpoints_are_read(small_shards: Path, run: Path, tmp_path: Path) -> None:
    with (run / "metrics.csv").open() as stream:
        logged = [row["val_top1"] for row in csv.DictReader(stream) if row["val_top1"]][-1]
    (run / "model.safetensors").rename(tmp_path / "moved.safetensors")
    try:
        for weights in (run, run / "checkpoints" / "last" / "model.safetensors", tmp_path / "moved.safetensors"):
            assert run_forked("tools/evaluate.py", weights, "--data", small_shards, "--json", tmp_path / "f.json").returncode == 0
            assert json.loads((tmp_path / "f.json").read_text())["top1"] == pytest.approx(float(logged))
    finally:
        (tmp_path / "moved.safetensors").rename(run / "model.safetensors")


@pytest.mark.slow
def test_torchvision_style_weights(small_shards: Path, run: Path, tmp_path: Path) -> None:
    weights, _ = load_weights(run / "model.safetensors")
    torch.save(weights, tmp_path / "model.pth")
    result = run_forked(
        "tools/evaluate.py", tmp_path / "model.pth", "--data", small_shards, "--arch", "resnet18", "--json", tmp_path / "f.json"
    )
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "f.json").read_text())["images"] == 21
    thousand = ARCHS["resnet18"]().state_dict()
    torch.save(thousand, tmp_path / "thousand.pth")
    (tmp_path / "junk.pth").write_text("junk")
    for path, options, words in (
        ("model.pth", (), "give --arch"),
        ("model.pth", ("--arch", "resnet34"), "does not fit resnet34"),
        ("model.pth", ("--arch", "vgg"), "unknown --arch"),
        ("thousand.pth", ("--arch", "resnet18"), "its 1000 classes differ from the 3 of the data"),
        ("junk.pth", ("--arch", "resnet18"), "junk.pth"),
        ("nowhere", (), "contains no weights"),
    ):
        assert_refused(run_forked("tools/evaluate.py", tmp_path / path, "--data", small_shards, *options), words)


def test_records_of_a_run(run: Path, tmp_path: Path) -> None:
    assert run_forked("tools/bench/record_run.py", run, "--results", tmp_path / "rows.csv").returncode == 0
    rows = {row["metric"]: row for row in csv.DictReader((tmp_path / "rows.csv").open())}
    assert 0 <= float(rows["val_top1"]["value"]) <= 1
    assert "resnet18 at 56" in rows["minutes"]["spec"]
    assert_refused(run_forked("tools/bench/record_run.py", tmp_path), "no finished run")
