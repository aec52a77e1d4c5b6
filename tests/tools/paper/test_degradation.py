from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.helpers import assert_refused, run_forked, without_progress
from training.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("one_core")

TRAINING = (
    "--",
    "--image-size",
    32,
    "--geometry",
    "pad",
    "--iterations",
    4,
    "--batch-size",
    20,
    "--log-every",
    1,
    "--threads",
    1,
)


def degradation(data: Path, folder: Path, *more: Any, training: tuple[Any, ...] = TRAINING) -> Any:
    options = ("--data", data, "--output", folder / "runs", "--nets", "plain20", "resnet20", "--results", folder / "rows.csv")
    return run_forked("tools/paper/degradation.py", *options, *more, *training)


@pytest.fixture(scope="module")
def done(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models trained with two seeds, 3 steps an epoch."""
    folder = tmp_path_factory.mktemp("degradation")
    result = degradation(small_shards, folder, "--seeds", 0, 1)
    assert result.returncode == 0, result.stderr
    assert "run 4 of 4: resnet20, seed 1" in result.stdout
    return folder


@pytest.mark.slow
def test_rows_hold_the_figures_of_the_runs(done: Path) -> None:
    with (done / "rows.csv").open(newline="") as stream:
        found = {(row["benchmark"], row["metric"]): row for row in csv.DictReader(stream)}
    assert len(found) == 4
    for arch in ("plain20", "resnet20"):
        train, val = [], []
        for seed in (0, 1):
            rows = read_metrics(done / "runs" / f"{arch}-seed{seed}" / "metrics.csv")
            tops = [float(row["train_top1"]) for row in rows if row["train_top1"]]
            assert len(tops) == 4
            train.append(100 * (1 - sum(tops[-3:]) / 3))  # the last epoch is 3 steps long
            val.append(100 * (1 - float(rows[-1]["val_top1"])))
        for metric, values in (("train_error_%", train), ("val_error_%", val)):
            row = found[arch, metric]
            assert [float(row[key]) for key in ("value", "low", "high")] == pytest.approx(
                [sum(values) / 2, min(values), max(values)], rel=1e-5
            )
            assert row["repeats"] == "2"


@pytest.mark.slow
def test_models_are_trained_with_the_same_options_and_shown_in_the_figure(done: Path) -> None:
    options = [
        json.loads((done / "runs" / f"{arch}-seed1" / "config.json").read_text())["arguments"] for arch in ("plain20", "resnet20")
    ]
    assert [one.pop("arch") for one in options] == ["plain20", "resnet20"]
    assert options[0].pop("output") != options[1].pop("output")
    assert options[0] == options[1]
    assert options[0]["seed"] == 1
    pixels = np.asarray(Image.open(done / "runs" / "figure4.png").convert("RGB"))
    blue = (pixels == (31, 119, 180)).all(axis=-1)  # matplotlib's first colour: each panel's first model
    middle = pixels.shape[1] // 2
    assert blue[:, :middle].sum() > 100
    assert blue[:, middle:].sum() > 100


@pytest.mark.slow
def test_a_second_start_trains_only_unfinished_runs(small_shards: Path, done: Path, tmp_path: Path) -> None:
    shutil.copytree(done / "runs", tmp_path / "runs", symlinks=True)
    for path in tmp_path.glob("runs/*/config.json"):  # the commands contain the folders
        path.write_text(path.read_text().replace(str(done), str(tmp_path)))
    stopped, broken = tmp_path / "runs" / "resnet20-seed0", tmp_path / "runs" / "resnet20-seed1"
    (stopped / "model.safetensors").unlink()  # as if killed after its last checkpoint
    shutil.rmtree(broken / "checkpoints")  # as if killed before its first checkpoint
    (broken / "model.safetensors").unlink()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("plain20-*/*")}
    result = degradation(small_shards, tmp_path, "--seeds", 0, 1)
    assert result.returncode == 0, result.stderr
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("plain20-*/*")} == kept
    for run in (stopped, broken):
        resumed, undisturbed = (load_file(folder / run.name / "model.safetensors") for folder in (run.parent, done / "runs"))
        assert all(torch.equal(resumed[name], undisturbed[name]) for name in undisturbed)


@pytest.mark.slow
def test_bad_input_is_refused(small_shards: Path, done: Path, tmp_path: Path) -> None:
    assert_refused(degradation(small_shards, done, training=("--", "--iterations", 5)), "plain20-seed0", "other options")
    assert_refused(degradation(small_shards, tmp_path, training=("--", "--arch", "plain18")), "--arch is not allowed after `--`")
    assert_refused(degradation(small_shards, tmp_path, "--nets", "vgg"), "unknown model 'vgg'")
    failed = without_progress(degradation(small_shards, tmp_path, training=("--", "--epochs", 0)))
    assert failed.returncode == 2
    assert "train.py ended with exit code 2" in failed.stderr.splitlines()[-1]
