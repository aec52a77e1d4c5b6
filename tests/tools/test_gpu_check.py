"""tools/gpu_check.py: whole without a GPU, and its checks where there is one (python -m pytest -m gpu)."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path

import pytest
import torch

from tests.helpers import assert_refused, run_script


def test_the_script_is_whole(tmp_path: Path) -> None:
    result = run_script(
        "tools/gpu_check.py", "--device", "cpu", "--arch", "resnet18", "--batch-size", 8, "--image-size", 64, "--images", 8,
        "--seconds", 0.05, "--results", tmp_path / "rows.csv",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    benchmarks = [row["benchmark"] for row in rows]
    assert benchmarks[:6] == ["pixels, training"] * 2 + ["pixels, evaluation"] * 2 + ["pixels, padded crops"] * 2
    compared = ["nets, " + arch for arch in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")]
    if importlib.util.find_spec("torchvision"):
        assert benchmarks[-5:] == compared
        benchmarks = benchmarks[:-5]
    else:
        assert "nets: torchvision is not installed" in result.stdout
    assert benchmarks[-4:] == ["train resnet18 bf16"] * 4
    feeds = benchmarks[6:-4:2]
    assert feeds[0] == "feed: stock DALI, original"
    for profile in ("original", "lossless", "compact"):
        assert {f"feed: dali, {profile}, hardware share {share}" for share in (0.0, 0.5, 0.9)} <= set(feeds)
    assert {"feed: dali, lossless, whole streams", "feed: cpu, lossless", "feed: cpu, compact"} <= set(feeds)
    ratios = {row["benchmark"]: float(row["value"]) for row in rows if row["metric"] == "ratio_to_stock_dali"}
    assert ratios.pop("feed: stock DALI, original") == 1
    assert all(ratio > 0 for ratio in ratios.values())
    assert all(float(row["low"]) <= float(row["value"]) <= float(row["high"]) for row in rows)
    assert int(rows[6]["repeats"]) == 5


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
