"""tools/bench/gpu_check.py: the script on a CPU, and its checks on a GPU, if there is one (python -m pytest -m gpu)."""

from __future__ import annotations

import ast
import csv
import re
import signal
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import simplejpeg
import torch
from torch import distributed

from model import ARCHS
from pipeline.batch import Batch
from pipeline.errors import UserError
from pipeline.loader import Loader
from pipeline.pixels.normalize import normalize_tensor
from pipeline.plan.geometry import ScaleJitter
from pipeline.spec import LoaderSpec
from tests.helpers import ROOT, open_image, run_forked
from tools.bench import gpu_check, gpu_pixels
from tools.bench.gpu_check import PROFILES
from tools.bench.gpu_loader import measure_loaders
from tools.bench.gpu_probe import measure_tail
from tools.bench.gpu_setting import Setting, use_of
from tools.bench.gpu_train import CLASSES, PlainStep, measure_graphs, measure_steps, measure_wrapped, synthetic
from tools.profiler.measuring import Budget, Usage
from tools.profiler.training import Model


@pytest.mark.slow
def test_all_parts_run_on_a_cpu_within_the_budget(image_folder: Path, tmp_path: Path) -> None:
    """On two cores, the run takes about a minute. Compiled steps run eagerly."""
    result = run_forked(
        "tools/bench/gpu_check.py", "--device", "cpu", "--arch", "resnet20", "--batch-size", 8, "--image-size", 32,
        "--source", image_folder, "--seconds", 0.02, "--budget", 280, "--results", tmp_path / "rows.csv",
        TORCHDYNAMO_DISABLE="1", CROPFEED_COMMIT="abc1234",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert not re.findall("skipped|stopped in the middle|FAILED", result.stdout), result.stdout
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert {row["commit"] for row in rows} == {"abc1234"}
    found: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in rows:
        found.setdefault((row["benchmark"], row["engine"]), []).append(row)
    loaders = [f"{name}, hardware share {share}" for name in PROFILES for share in (0.0, 0.5, 0.9)]
    expected = [
        ("probe", "none"),
        *(("train resnet20 bf16", engine) for engine in ("cpu", "dali")),
        ("feed: cpu, lossless, 1 threads", "cpu"),
        *((f"pixels, {profile}, hardware share {share}, held batches", "dali") for profile in PROFILES for share in (0, 1)),
        *((f"feed: dali, {name}", "dali") for name in loaders),
        ("feed: cpu, compact", "cpu"),
        ("train step, resnet20 bf16", "ours"),
        ("tail, eager", "torch"),
        ("train step with EMA, resnet20 bf16", "reduce-overhead"),
        *(("train step in DDP, resnet20 bf16", f"compiled {where}") for where in ("inside", "outside")),
    ]
    assert [key for key in found if key in expected] == expected
    for (benchmark, engine), figures in found.items():
        metrics = [figure["metric"] for figure in figures]
        if benchmark.startswith("train resnet20"):  # peak memory and the share of the peak need a GPU
            assert metrics == [
                "images_per_s_synthetic", "images_per_s_shards", "ratio", "wait_share", "cpu_seconds_per_image",
            ]  # fmt: skip
        if benchmark.startswith("feed"):
            assert "cpu_seconds_per_image" in metrics
            with_ratio = engine != "stock DALI" and not benchmark.endswith("threads")
            assert ("ratio_to_stock_dali" in metrics) == with_ratio
        assert all(int(figure["repeats"]) == 5 for figure in figures if "ratio" in figure["metric"])
    assert all(float(row["low"]) <= float(row["value"]) <= float(row["high"]) for row in rows)


def rows_of(*rows: bool, seconds: float = 0.0) -> gpu_check.Part:
    def part(setting: Setting) -> Iterator[bool]:
        for row in rows:
            time.sleep(seconds)
            yield row

    return part


def failing(setting: Setting) -> Iterator[bool]:
    yield True
    raise RuntimeError("no kernel image is available")


def hanging(setting: Setting) -> Iterator[bool]:
    try:
        time.sleep(9)
    except Exception:
        yield True


def test_parts_keep_their_order_and_the_budget(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    parts = {
        "long": (rows_of(True, True, True, True, seconds=0.1), 20),
        "broken": (failing, 20),
        "bad": (rows_of(True, False), 20),
        "hanging": (hanging, 20),
        "last": (rows_of(True), 20),
    }
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    setting = Setting({}, SPEC, Path(), Path(), 1.0, 5, "images")
    handler = signal.getsignal(signal.SIGALRM)
    for name in ("dump_traceback_later", "cancel_dump_traceback_later"):  # pytest replaces stderr, and uses them itself
        monkeypatch.setattr(gpu_check.faulthandler, name, lambda *_, **__: None)
    gpu_check.limit_time(0.8)
    try:
        assert not gpu_check.run_parts(setting, ["last", "hanging", "bad", "broken", "long"], Budget(0.8))
    finally:
        gpu_check.end_limit()
        signal.signal(signal.SIGALRM, handler)
    lines = [line for line in capsys.readouterr().out.splitlines() if not re.search(r": \d+ s$", line)]
    assert lines == [
        "long: stopped, its time is used up; what it would measure next is left out",
        "broken: FAILED with an error",
        "bad: FAILED",
        "hanging: stopped in the middle, the budget is used up",
        "last: skipped, the budget of 1 s is used up",
    ]


def test_loaders_have_the_threads_of_train_py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of 16 cores are left to the training thread and the rest."""
    found: list[LoaderSpec] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr("pipeline.cores.core_quota", lambda _: float("inf"))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr("training.tuned.load", lambda _: None)
    monkeypatch.setattr(gpu_check, "make_data", lambda *_: {"lossless": tmp_path})
    monkeypatch.setattr(gpu_check, "run_parts", lambda setting, *_: found.append(setting.spec))
    gpu_check.check(gpu_check.GpuCheckOptions(parts=("train",)), tmp_path, time.perf_counter())
    assert found[0].threads == 14


def test_rows_have_cpu_seconds_per_image_and_the_use_of_the_jpeg_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(4)))
    monkeypatch.setattr("pipeline.cores.core_quota", lambda _: float("inf"))
    usages = [Usage(seconds=2.0, cpu_share=0.5, jpeg_share=0.25), Usage(seconds=1.0, cpu_share=1.0, jpeg_share=0.75)]
    assert use_of(usages, [100, 200]) == {"cpu_seconds_per_image": [0.04, 0.02], "jpeg_engine_share": [0.25, 0.75]}
    assert use_of([Usage(seconds=1.0, cpu_share=0.5)], [4]) == {"cpu_seconds_per_image": [0.5], "jpeg_engine_share": []}


def test_no_module_of_the_check_imports_dali_at_its_start() -> None:
    for file in (ROOT / "tools" / "bench").glob("gpu_*.py"):
        imports = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {name.name for node in imports for name in node.names} | {str(getattr(node, "module", "")) for node in imports}
        assert not [name for name in names if "dali" in name], file


@pytest.mark.slow
def test_loaders_are_measured_without_dali(
    small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    spec = replace(SPEC, data=small_shards)
    setting = Setting(dict.fromkeys(PROFILES, small_shards), spec, tmp_path, tmp_path / "rows.csv", 0.02, 2, "images")
    assert all(measure_loaders(setting))
    with (tmp_path / "rows.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {(row["benchmark"], row["engine"]) for row in rows} == {
        (f"feed: cpu, {name}", "cpu") for name in ("lossless", "compact")
    }
    assert "ratio_to_stock_dali" not in {row["metric"] for row in rows}
    assert "DALI cannot be imported" in capsys.readouterr().out


def test_unusual_images_have_every_subsampling_and_restart_intervals(tmp_path: Path) -> None:
    count = gpu_pixels.write_unusual_images(tmp_path / "a")
    files = {file.stem: file.read_bytes() for file in (tmp_path / "a").iterdir()}
    assert count == len(files) == 30
    sampled = {simplejpeg.decode_jpeg_header(data)[3] for data in files.values()}
    assert sampled == {"444", "422", "420", "440", "411", "Gray"}
    assert {
        struct.unpack(">H", data[data.index(b"\xff\xdd\0\4") + 4 :][:2])[0] for name, data in files.items() if "restart" in name
    } == {1, 5}
    assert {open_image(data).size for data in files.values()} == {(1, 1), (7, 9), (65, 33), (501, 375)}


@pytest.mark.slow
def test_wrong_pixels_and_overwritten_batches_are_found(
    small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = replace(SPEC, data=small_shards, engine="cpu")
    setting = Setting({}, spec, tmp_path, tmp_path / "rows.csv", 0.02, 2, "images")
    assert gpu_pixels.check(setting, "good", spec, 8, 3)
    batches = gpu_pixels.endless

    def reusing(loader: Loader) -> Iterator[Batch]:
        """Batches in the memory of the first one, from the fifth on."""
        first = None
        for number, batch in enumerate(batches(loader)):
            first = batch if first is None else first
            if number > 3:
                first.images.copy_(batch.images)
            yield batch

    monkeypatch.setattr(gpu_pixels, "endless", reusing)
    assert not gpu_pixels.check(setting, "reused", spec, 8, 3)
    assert "pixels, reused (cpu): FAILED" in capsys.readouterr().out


SPEC = LoaderSpec("nowhere", batch_size=4, image_size=32, geometry=ScaleJitter(36, 48))


def install(monkeypatch: pytest.MonkeyPatch, torchvision: ModuleType | None, timm: ModuleType | None) -> None:
    """Replace the packages by these modules. None: the package cannot be imported."""
    for name, module in (("torchvision", torchvision), ("torchvision.models", torchvision), ("timm", timm)):
        monkeypatch.setitem(sys.modules, name, module)


def measured_steps(tmp_path: Path) -> dict[tuple[str, str], dict[str, str]]:
    setting = Setting({}, SPEC, tmp_path, tmp_path / "rows.csv", 0.04, 3, "images", ("resnet20",))
    assert all(measure_steps(setting))
    with (tmp_path / "rows.csv").open(newline="") as stream:
        return {(row["engine"], row["metric"]): row for row in csv.DictReader(stream)}


def test_the_eager_tail_is_not_recorded_as_the_fused_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    setting = Setting({}, SPEC, tmp_path, tmp_path / "rows.csv", 0.004, 2, "images")
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "pipeline.pixels.fused", raising=False)
    assert list(measure_tail(setting)) == [True, True]
    assert "tail, fused: does not work here (import of triton halted" in capsys.readouterr().out

    monkeypatch.setitem(sys.modules, "pipeline.pixels.fused", SimpleNamespace(normalize_fused=normalize_tensor))
    assert list(measure_tail(setting)) == [True, True, True]
    with (tmp_path / "rows.csv").open(newline="") as stream:
        measured = [row["benchmark"] for row in csv.DictReader(stream) if row["metric"] == "milliseconds"]
    assert measured == [f"tail, {name}" for name in ("eager", "compiled", "eager", "fused", "compiled")]


@pytest.mark.slow
def test_an_average_that_does_not_follow_a_compiled_model_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting({}, SPEC, tmp_path, tmp_path / "rows.csv", 0.004, 1, "images", ("resnet20",))
    monkeypatch.setattr(Model, "compile", lambda *_: None)
    assert list(measure_graphs(setting)) == [True]

    def compiles_a_copy(model: Model, *_: object) -> None:
        model.module = ARCHS["resnet20"](num_classes=CLASSES)  # whose weights no optimizer updates

    monkeypatch.setattr(Model, "compile", compiles_a_copy)
    assert list(measure_graphs(setting)) == [False]


@pytest.mark.slow
def test_the_step_in_ddp_is_measured_compiled_inside_and_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen, failure = [], dict[str, str]()

    def compiles(model: Model, *_: object) -> str | None:
        seen.append((type(model.module).__name__, distributed.get_world_size()))
        return failure.get(seen[-1][0])

    monkeypatch.setattr(Model, "compile", compiles)
    setting = Setting({}, SPEC, tmp_path, tmp_path / "rows.csv", 0.004, 2, "images", ("resnet20",))
    assert list(measure_wrapped(setting)) == [True, True]
    assert seen == [("ResNet", 1), ("DistributedDataParallel", 1)]
    with (tmp_path / "rows.csv").open(newline="") as stream:
        rows = {(row["engine"], row["metric"]) for row in csv.DictReader(stream)}
    assert rows >= {("compiled inside", "ratio_to_eager"), ("compiled outside", "ratio_to_compiled_inside")}
    assert not distributed.is_initialized()
    failure["DistributedDataParallel"] = "torch.compile does not work here (no compiler)"
    assert list(measure_wrapped(setting)) == [True]
    assert "train step in DDP, compiled outside: torch.compile does not work here" in capsys.readouterr().out
    assert not distributed.is_initialized()


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
        assert 0.05 < float(rows[(name, "ratio_of_ours")]["value"]) < 20
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
    assert rows[("train resnet50 bf16", "ratio")] > 0.5
    assert rows[("train resnet50 bf16", "peak_memory_gib")] > 1
