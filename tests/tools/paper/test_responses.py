from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model import ARCHS
from model.weights import ModelConfig, save_weights
from pipeline.store.shards import Manifest
from tests.helpers import run_forked

pytestmark = pytest.mark.usefixtures("one_core")


def test_two_nets_in_one_picture(small_shards: Path, tmp_path: Path) -> None:
    classes = Manifest(small_shards).classes
    torch.manual_seed(0)
    for arch in ("plain20", "resnet20"):
        zero, one = np.full(3, 120, np.float32), np.full(3, 60, np.float32)
        recipe = ModelConfig(arch, classes, 32, 32, zero, one)
        save_weights(tmp_path / f"{arch}.safetensors", ARCHS[arch](num_classes=3).state_dict(), recipe.header())
    files = [tmp_path / "plain20.safetensors", tmp_path / "resnet20.safetensors"]
    options = ("--data", small_shards, "--images", 10, "--batch-size", 8)
    result = run_forked(
        "tools/paper/responses.py", *files, *options, "--output", tmp_path / "f.png", "--csv", tmp_path / "f.csv"
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "plain20, 19 layers, mean std" in result.stdout
    with (tmp_path / "f.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 2 * 19
    assert all(float(row["std"]) > 0 for row in rows)
    picture = np.asarray(Image.open(tmp_path / "f.png").convert("RGB")).reshape(-1, 3)
    for color in ((31, 119, 180), (255, 127, 14)):  # one line each, in matplotlib's first two colours
        assert (picture == color).all(axis=1).sum() > 100

    fewer = run_forked("tools/paper/responses.py", files[0], "--data", small_shards, "--images", 2, "--csv", tmp_path / "g.csv",
                       "--output", tmp_path / "g.png")  # fmt: skip
    assert fewer.returncode == 0, fewer.stderr
    assert (tmp_path / "g.csv").read_text().splitlines()[1:] != (tmp_path / "f.csv").read_text().splitlines()[1:20]
