"""tools/bench/gpu_check.py: the script on a CPU, and its checks on a GPU, if there is one (python -m pytest -m gpu)."""

from __future__ import annotations

import csv
import importlib.util
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from model import ARCHS
from pipeline.errors import UserError
from pipeline.plan.geometry import ScaleJitter
from pipeline.spec import LoaderSpec
from tests.helpers import run_forked
from tools.bench import bench_accuracy, gpu_check
from tools.bench.gpu_train import CLASSES, PlainStep, measure_steps, share_of_peak, synthetic
from tools.profiler.training import Model
from training.options import make_sizes


@pytest.mark.slow
def test_all_parts_run_on_a_cpu(image_folder: Path, tmp_path: Path) -> None:
    result = run_forked(
        "tools/bench/gpu_check.py", "--device", "cpu", "--arch", "resnet18", "--batch-size", 8, "--image-size", 64,
        "--source", image_folder, "--seconds", 0.02, "--results", tmp_path / "rows.csv",
        "--parts", "models", "profile", "loader", "train", "pixels",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    benchmarks = [row["benchmark"] for row in rows]
    assert benchmarks[:6] == ["pixels, training"] * 2 + ["pixels, evaluation"] * 2 + ["pixels, padded crops"] * 2
    assert benchmarks[6:10] == ["train resnet18 bf16"] * 4  # peak memory and the share of the peak need a GPU
    assert [row["metric"] for row in rows[6:10]] == ["images_per_s_synthetic", "images_per_s_shards", "ratio", "wait_share"]
    compared = ["nets, " + arch for arch in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")]
    if importlib.util.find_spec("torchvision"):
        assert benchmarks[-5:] == compared
        benchmarks = benchmarks[:-5]
    else:
        assert "models: torchvision is not installed" in result.stdout
    loaders = benchmarks[10::2]
    assert loaders[0] == "feed: stock DALI, original"
    for profile in ("original", "lossless", "compact"):
        assert {f"feed: dali, {profile}, hardware share {share}" for share in (0.0, 0.5, 0.9)} <= set(loaders)
    assert {"feed: dali, lossless, whole streams", "feed: cpu, lossless", "feed: cpu, compact"} <= set(loaders)
    ratios = {row["benchmark"]: float(row["value"]) for row in rows if row["metric"] == "ratio_to_stock_dali"}
    assert ratios.pop("feed: stock DALI, original") == 1
    assert all(ratio > 0 for ratio in ratios.values())
    assert all(float(row["low"]) <= float(row["value"]) <= float(row["high"]) for row in rows)
    assert int(rows[6]["repeats"]) == 5


def test_imagenette_is_trained_with_options_that_the_scripts_have(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found: list[str] = []

    def started(words: list[str], **_: object) -> SimpleNamespace:
        found.extend(words)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(gpu_check.subprocess, "run", started)
    assert gpu_check.train_imagenette(tmp_path, 160, tmp_path / "rows.csv")
    accuracy = bench_accuracy.parse(found[2:])
    assert (accuracy.contenders, accuracy.levels) == (("cropfeed",), (80, 85, 90))
    assert accuracy.results == tmp_path / "rows_accuracy.csv"
    options = accuracy.train_options(0)
    assert (options.arch, options.eval_size) == ("resnet18", 160)
    sizes = make_sizes(options, 147)
    assert isinstance(sizes, tuple)
    assert (sizes[0], sizes[-1][1]) == ((0, 128), 160)


SPEC = LoaderSpec("nowhere", batch_size=4, image_size=32, geometry=ScaleJitter(36, 48))


def install(monkeypatch: pytest.MonkeyPatch, torchvision: ModuleType | None, timm: ModuleType | None) -> None:
    """Replace the packages by these modules. None: the package cannot be imported."""
    for name, module in (("torchvision", torchvision), ("torchvision.models", torchvision), ("timm", timm)):
        monkeypatch.setitem(sys.modules, name, module)


def measured_steps(tmp_path: Path) -> dict[tuple[str, str], dict[str, str]]:
    measure_steps(SPEC, "resnet20", tmp_path / "rows.csv", 0.01, 3, "SPEC")
    with (tmp_path / "rows.csv").open(newline="") as stream:
        return {(row["engine"], row["metric"]): row for row in csv.DictReader(stream)}


@pytest.mark.slow
def test_steps_are_compared_with_other_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torchvision, timm = ModuleType("torchvision.models"), ModuleType("timm")
    vars(torchvision)["resnet20"] = partial(ARCHS["resnet20"], num_classes=CLASSES)
    vars(timm)["create_model"] = lambda arch, num_classes: ARCHS[arch](num_classes=num_classes)
    install(monkeypatch, torchvision, timm)
    monkeypatch.setattr(Model, "compile", lambda *_: None)
    rows = measured_steps(tmp_path)
    printed = capsys.readouterr().out
    others = ("torchvision", "timm", "timm, channels-last")
    assert {engine for engine, _ in rows} == {"ours", "ours, compiled", *others}
    assert ("ours, compiled", "ratio_to_ours") in rows
    for name in others:
        for metric in ("ratio_of_ours", "ratio_of_ours_compiled"):
            assert int(rows[(name, metric)]["repeats"]) == 3
        low, high = (float(rows[(name, "ratio_of_ours")][which]) for which in ("low", "high"))
        mine, other = rows[("ours", "images_per_s")], rows[(name, "images_per_s")]
        assert float(mine["low"]) / float(other["high"]) <= low * 1.001
        assert high <= float(mine["high"]) / float(other["low"]) * 1.001
        assert f" x {name} (goal 1.1)" in printed


def test_steps_without_other_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, None, None)
    monkeypatch.setattr(Model, "compile", lambda *_: "torch.compile does not work here (no compiler)")
    assert set(measured_steps(tmp_path)) == {("ours", "images_per_s")}
    printed = capsys.readouterr().out
    for what in ("no compiler", "torchvision is not installed", "timm is not installed"):
        assert what in printed


@pytest.mark.parametrize("script", ["torchvision", "timm"])
def test_the_reference_step(script: str) -> None:
    """Two updates equal those of the scripts' optimizers, computed by the documented formula of PyTorch's SGD."""
    torch.manual_seed(0)
    model = ARCHS["resnet20"](num_classes=CLASSES)
    batch = synthetic(SPEC, torch.float32, torch.contiguous_format)
    step = PlainStep(model, "cpu", torch.contiguous_format, script)
    momenta: dict[str, torch.Tensor] = {}
    for _ in range(2):
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        step.step(batch)
        for name, value in model.named_parameters():
            assert value.grad is not None
            decay = 0.0 if script == "timm" and value.ndim == 1 else 1e-4
            slope = value.grad + decay * before[name]
            momenta[name] = 0.9 * momenta[name] + slope if name in momenta else slope
            moved = slope + 0.9 * momenta[name] if script == "timm" else momenta[name]
            torch.testing.assert_close(value.detach(), before[name] - 1e-3 * moved)


def test_share_of_peak() -> None:
    # ResNet-50 at 224: 4.089e9 multiply-adds (torchvision's documentation: 4.09 GFLOPS), of two operations each, three times.
    assert share_of_peak("resnet50", 224, 3000, "NVIDIA H100 80GB HBM3") == pytest.approx(3000 * 6 * 4.089e9 / 989e12, rel=1e-3)
    assert share_of_peak("resnet50", 224, 3000, "Voodoo 2") is None


def test_the_profilers_model_compiles_like_train_py(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model("resnet20", "bf16", SPEC, CLASSES)
    batch = synthetic(SPEC, torch.bfloat16, torch.channels_last)
    eager = model.module
    modes = []

    def compiles(module: torch.nn.Module, mode: str) -> torch.nn.Module:
        modes.append(mode)
        return torch.nn.Sequential(module)

    monkeypatch.setattr(torch, "compile", compiles)
    assert model.compile("max-autotune", batch.images) is None
    assert modes == ["max-autotune"]
    assert isinstance(model.module, torch.nn.Sequential)
    before = [value.detach().clone() for value in eager.parameters()]
    model.step(batch)
    assert all((new != old).any() for new, old in zip(eager.parameters(), before, strict=True) if new.ndim > 1)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: torch.nn.Linear(1, 1))  # its forward pass fails
    assert "does not work here" in (model.compile("default", batch.images) or "")


def test_no_gpu_row_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--device", "cpu"])
    with pytest.raises(UserError, match="give another `results` file"):
        gpu_check.main()
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA GPU"):
            gpu_check.main()


@pytest.mark.gpu
def test_everything_on_the_gpu(tmp_path: Path) -> None:
    result = run_forked("tools/bench/gpu_check.py", "--seconds", 2, "--results", tmp_path / "rows.csv")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = {(row["benchmark"], row["metric"]): float(row["value"]) for row in csv.DictReader((tmp_path / "rows.csv").open())}
    for arch in ("resnet18", "resnet50", "resnet152"):
        assert rows[(f"train {arch} bf16", "ratio")] > 0.5
        assert rows[(f"train {arch} bf16", "peak_memory_gib")] > 1
