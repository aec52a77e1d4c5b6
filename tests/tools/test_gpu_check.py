"""tools/gpu_check.py: whole without a GPU, and its checks where there is one (python -m pytest -m gpu)."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from tests.helpers import assert_refused, run_script


def test_the_script_is_whole(tmp_path: Path) -> None:
    result = run_script(
        "tools/gpu_check.py", "--device", "cpu", "--arch", "resnet18", "--batch-size", 8, "--image-size", 64, "--images", 8,
        "--seconds", 0.2, "--results", tmp_path / "rows.csv",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert [row["benchmark"] for row in rows] == ["pixels, training"] * 2 + ["pixels, evaluation"] * 2 + ["feed"] + [
        "train resnet18 bf16"
    ] * 4
    assert all(float(row["low"]) <= float(row["value"]) <= float(row["high"]) for row in rows)
    assert int(rows[4]["repeats"]) == 5


def test_no_gpu_row_without_a_gpu() -> None:
    assert_refused(run_script("tools/gpu_check.py", "--device", "cpu"), "give another --results")
    if not torch.cuda.is_available():
        assert_refused(run_script("tools/gpu_check.py"), "no CUDA GPU")


@pytest.mark.gpu
def test_everything_on_the_gpu(tmp_path: Path) -> None:
    result = run_script("tools/gpu_check.py", "--seconds", 2, "--results", tmp_path / "rows.csv")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = {(row["benchmark"], row["metric"]): float(row["value"]) for row in csv.DictReader((tmp_path / "rows.csv").open())}
    assert rows[("train resnet50 bf16", "ratio")] > 0.5
