"""Whole runs of train.py: their accuracy, files, output and errors."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import train
from model import ARCHS
from model.weights import ModelConfig, load_weights
from pipeline import open_loader
from pipeline.plan import sampling
from pipeline.plan.geometry import ScaleJitter
from pipeline.spec import LoaderSpec
from pipeline.store.shards import ShardSet
from tests.helpers import assert_refused, run_forked, run_script, without_progress, working_threads
from tests.runs import EPOCHS, STEPS, arguments, steps_logged, torchrun, traces
from tools import profile_pipeline
from training import tuned
from training.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("one_core")

TORCHRUN = torchrun(29611)


def test_a_run_learns_and_writes_all_files(small_shards: Path, finished: Path) -> None:
    rows = read_metrics(finished / "metrics.csv")
    losses = [float(row["train_loss"]) for row in rows if row["train_loss"]]
    assert len(losses) == EPOCHS * STEPS
    assert sum(losses[-STEPS:]) < 0.7 * sum(losses[:STEPS])
    tops = [float(row["val_top1"]) for row in rows if row["val_top1"]]
    assert len(tops) == EPOCHS
    shares = [float(row["train_top1"]) for row in rows if row["train_top1"]]
    assert len(shares) == EPOCHS * STEPS
    assert all(share * 8 == int(share * 8) for share in shares)  # shares of a batch of 8
    assert sum(shares[:STEPS]) / STEPS < sum(shares[-STEPS:]) / STEPS <= 1
    assert all(0 <= float(row["wait_share"]) <= 1 and float(row["images_per_s"]) > 0 for row in rows if row["train_loss"])
    weights, header = load_weights(finished / "model.safetensors")
    assert weights.keys() == ARCHS["resnet20"](num_classes=3).state_dict().keys()
    config = ModelConfig.from_header(header)
    assert config is not None
    assert (config.arch, config.image_size, config.eval_short, config.mean.shape) == ("resnet20", 32, 37, (32, 32, 3))
    assert {path.name for path in (finished / "checkpoints").iterdir()} >= {"last", "best", "step-00000035"}
    assert json.loads((finished / "config.json").read_text())["arguments"]["batch_size"] == 8
    assert list(finished.glob("tensorboard/*tfevents*"))
    trained = traces(finished.parent / "trace")
    assert sorted(trained) == [(epoch, 8 * step) for epoch in range(EPOCHS) for step in range(1, STEPS + 1)]
    for epoch in range(EPOCHS):
        ids = [index for step in range(1, STEPS + 1) for index in trained[(epoch, 8 * step)]["ids"]]
        assert ids == sampling.order(0, epoch, range(56), 60).tolist()


def test_initial_weights(small_shards: Path, finished: Path, tmp_path: Path) -> None:
    """With a negligible learning rate, a run ends with its initial weights, except for BN's statistics."""
    options = [*arguments(small_shards, tmp_path / "run"), "--epochs", 1, "--lr", 1e-12, "--weights"]
    result = run_forked("train.py", *options, finished)
    assert result.returncode == 0, result.stderr
    assert "training starts from these resnet20 weights, including the classifier" in result.stdout
    before, after = load_file(finished / "model.safetensors"), load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.allclose(after[name], before[name], atol=1e-7) for name in before if name.endswith(("weight", "bias")))
    refused = run_forked("train.py", *options, finished, "--output", tmp_path / "other", "--arch", "resnet34")
    assert_refused(refused, "holds a resnet20, but --arch is resnet34")
    assert not (tmp_path / "other").exists()


def test_padded_crops_in_the_recipe_cifar110(small_shards: Path, tmp_path: Path) -> None:
    """The run follows the recipe's learning rates, can be recorded, and is evaluated on centre crops of the full short side."""
    run = tmp_path / "run"
    result = run_forked(
        "train.py", "--data", small_shards, "--output", run, "--recipe", "cifar110", "--arch", "resnet20", "--iterations", 8,
        "--warmup", 2, "--batch-size", 20, "--threads", 1, "--log-every", 1,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rates = [float(row["lr"]) for row in read_metrics(run / "metrics.csv") if row["lr"]]
    assert rates == pytest.approx([0.01, 0.01, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    config = ModelConfig.from_header(load_weights(run / "model.safetensors")[1])
    assert config is not None
    assert (config.arch, config.image_size, config.eval_short) == ("resnet20", 32, 32)
    assert run_forked("tools/bench/record_run.py", run, "--results", tmp_path / "rows.csv").returncode == 0
    assert "resnet20 at 32, crops of the padded image, 8 iterations" in (tmp_path / "rows.csv").read_text()


@pytest.mark.slow
def test_two_processes_share_the_epoch(small_shards: Path, tmp_path: Path) -> None:
    options = arguments(small_shards, tmp_path / "run", "--epochs", 2, "--accumulate", 2, "--mixed-precision", "bf16")
    result = run_script(
        "tests/traced_train.py", *options, launcher=TORCHRUN, ACCELERATE_USE_CPU="true", TRACE=str(tmp_path / "trace")
    )
    assert result.returncode == 0, result.stderr
    seen: dict[str, list[int]] = {}
    for path in tmp_path.glob("trace.*"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        seen[path.suffix] = [index for row in rows if row["epoch"] == 0 for index in row["ids"]]
    assert len(seen[".0"]) == len(seen[".1"]) == 28
    assert not set(seen[".0"]) & set(seen[".1"])
    assert set(seen[".0"]) | set(seen[".1"]) == set(sampling.order(0, 0, range(56), 60).tolist())
    counted = [
        line for line in result.stderr.replace("\r", "\n").splitlines() + result.stdout.splitlines() if "of 21 images" in line
    ]
    assert len(counted) == 2  # each validation saw every image once, over both ranks
    assert steps_logged(tmp_path / "run") == 2 * STEPS
    assert (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.slow
def test_without_an_output_the_run_is_the_latest(small_shards: Path, tmp_path: Path) -> None:
    """Train without --output, then evaluate runs/latest, as in the README."""
    options = ("--data", small_shards, "--arch", "resnet18", "--epochs", 1, "--batch-size", 20, "--image-size", 32)
    launcher = ("-m", "accelerate.commands.launch")
    result = run_script("train.py", *options, launcher=launcher, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "runs" / "latest").resolve() == tmp_path / "runs" / "resnet18"
    result = run_forked("tools/evaluate.py", "runs/latest", "--data", small_shards, "--json", "figures.json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "figures.json").read_text())["images"] == 21
    assert_refused(run_forked("train.py", *options, cwd=tmp_path), "exists already")


def test_blocks_random_resized_crops_and_a_corrupt_image(small_shards: Path, tmp_path: Path) -> None:
    """A run on damaged shards reports replaced images once per epoch, and can be recorded."""
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(small_shards, data)
    shards = ShardSet(data, "train")
    record = shards.samples[7]
    with shards.shards[record["shard"]].open("r+b") as stream:
        stream.seek(int(record["offset"]))
        stream.write(bytes(int(record["bytes"])))
    options = (
        "--data", data, "--output", run, "--arch", "resnet18", "--epochs", 2, "--batch-size", 20, "--image-size", 32,
        "--geometry", "rrc", "--order", "blocks", "--block-shards", 2, "--threads", 1, "--log-every", 1,
    )  # fmt: skip
    result = run_forked("train.py", *options)
    assert result.returncode == 0, result.stderr
    assert "epoch 1: 1 images that could not be decoded have been replaced so far" in result.stdout
    assert "epoch 2: 2 images that could not be decoded have been replaced so far" in result.stdout
    assert result.stderr.count(": cannot be decoded (") == 1
    assert json.loads((run / "config.json").read_text())["arguments"]["scale"] is None
    assert run_forked("tools/bench/record_run.py", run, "--results", tmp_path / "rows.csv").returncode == 0
    assert "random resized crops" in (tmp_path / "rows.csv").read_text()
    stopping = run_forked("train.py", *options[:2], "--output", tmp_path / "other", *options[4:], "--corrupt", "stop")
    assert_refused(without_progress(stopping), f"{shards.locate(7)}: cannot be decoded", "make the shards again")


@pytest.mark.slow
def test_tuned_settings_and_the_profilers_command_when_a_run_waits(
    small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tuned settings are read from the file, and options override them. A run from slow storage suggests the profiler."""
    monkeypatch.setenv("CROPFEED_TUNED", str(tmp_path / "tuned.json"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tuned.save(LoaderSpec(small_shards, device=device), 3, 5, 100.0)
    options = (
        "--data", small_shards, "--arch", "resnet18", "--epochs", 1, "--batch-size", 12, "--image-size", 32,
        "--scale", 36, 68, "--log-every", 1,
    )  # fmt: skip
    result = run_forked("train.py", *options, "--output", tmp_path / "tuned")
    assert result.returncode == 0, result.stderr
    assert "; 3 threads, prefetch 5\n" in result.stdout

    more = ("--threads", 2, "--prefetch", 1, "--order", "blocks", "--engine", "cpu", "--output", tmp_path / "slow")
    # About 6 images/s, slower than any machine trains.
    result = run_forked("tests/slowed_train.py", *options, *more, MEGABYTES_PER_S="0.02")
    assert result.returncode == 0, result.stderr
    assert "; 2 threads, prefetch 1\n" in result.stdout
    rows = read_metrics(tmp_path / "slow" / "metrics.csv")
    waits = [float(row["wait_share"]) for row in rows if row["wait_share"]]
    assert len(waits) == 5
    waited = next(share for share in waits[1:] if share > 0.05)  # the first row includes the loader's start
    (suggestion,) = (line for line in result.stdout.splitlines() if "training waits for data" in line)
    assert f"training waits for data {waited:.0%} of the time" in suggestion
    python, script, *words = shlex.split(suggestion.split("what to change, run: ")[1])
    assert (python, script) == ("python", "tools/profile_pipeline.py")
    command = profile_pipeline.parse(words)
    spec = command.options.spec
    assert (spec.data, command.options.arch, command.options.precision) == (str(small_shards), "resnet18", "no")
    assert (spec.batch_size, spec.image_size, spec.geometry, spec.order) == (12, 32, ScaleJitter(36, 68), "blocks")
    assert (spec.engine, command.threads, command.prefetch) == ("cpu", 2, 1)


@pytest.mark.slow
def test_launches_that_would_not_train_in_parallel_are_refused(small_shards: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("these launches are correct on a machine with a GPU")
    run = tmp_path / "run"
    launched = run_script(
        "train.py", *arguments(small_shards, run), launcher=("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2")
    )
    assert launched.returncode != 0
    assert (
        "error: accelerate launch was asked for several CPU processes but started one; use: ACCELERATE_USE_CPU=true"
        in launched.stderr
    )
    torchrun = run_script("train.py", *arguments(small_shards, run), launcher=TORCHRUN)
    assert torchrun.returncode != 0
    assert (
        "error: torchrun started 2 processes, but each would train alone; on a CPU set ACCELERATE_USE_CPU=true" in torchrun.stderr
    )
    assert not run.exists()


def test_bad_input_is_refused_and_writes_nothing(small_shards: Path, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def refused(*options: Any, words: str, data: Path = small_shards) -> None:
        assert_refused(run_forked("train.py", *arguments(data, run, *options)), words)
        assert not run.exists()

    refused("--arch", "resnet19", words="unknown --arch 'resnet19'; choose from plain18, plain34, resnet18, resnet18_a")
    refused("--arch", "resnet18", words="no such folder", data=tmp_path / "nowhere")
    refused("--resume", words="no checkpoint to resume from")
    refused("--batch-size", 61, words="fewer than one batch")
    refused("--accumulate", 3, words="multiple of processes")
    refused("--epochs", 0, words="must be at least 1")
    refused("--epochs", "many", words="--epochs")
    refused("--scale", 20, 30, words="image size")
    refused("--geometry", "rrc", words="--scale belongs to --geometry jitter")
    refused("--order", "sequential", words="--order")
    refused("--weights", tmp_path / "none.pth", words="contains no weights")
    refused("--recipe", "none", words="no recipe 'none'; choose from cifar")
    refused("--block-shards", 0, words="--block-shards")
    refused(
        "--mixup", 1, "--accumulate", 8, words="--mixup and --cutmix mix pairs of images; change --batch-size or --accumulate"
    )
    refused("--start-size", 16, "--ramp", 1, 5, words="the last epoch must have --image-size 32")
    if not torch.cuda.is_available():
        refused("--amp", "fp16", words="training in fp16 is not supported on a CPU; use --amp bf16 or --amp no")
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert_refused(run_forked("train.py", *arguments(small_shards, finished)), "exists already")
    assert_refused(
        run_forked("train.py", *arguments(small_shards, finished, "--resume", "--arch", "resnet34")), "but --arch is resnet34"
    )
    assert_refused(run_forked("train.py", *arguments(small_shards, finished, "--resume", "--seed", 1)), "other data, seed")
    assert_refused(
        run_forked("train.py", *arguments(small_shards, finished, "--resume", "--batch-size", 16)), "with --batch-size 8"
    )
    assert_refused(
        run_forked("train.py", *arguments(small_shards, finished, "--resume", "--ema", 0.9)),
        "was saved without --ema; resume without --ema",
    )
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_the_validation_loader_holds_no_threads_while_training_runs(small_shards: Path, tmp_path: Path) -> None:
    """Two validations in a row: the second one starts new threads."""
    loader = open_loader(LoaderSpec(small_shards, batch_size=8, image_size=32).evaluation())
    run, seen = train.Run.__new__(train.Run), list[int]()
    run.val_loader, run.progress, run.output = loader, train.Progress(), tmp_path
    run.loader = SimpleNamespace(classes=loader.classes)  # type: ignore[assignment]
    run.learner = SimpleNamespace(eval_model=None)  # type: ignore[assignment]
    run.stop = SimpleNamespace(checked=lambda batches, _: batches)  # type: ignore[assignment]
    run.accelerator = SimpleNamespace(device="cpu", autocast=None, is_main_process=False)
    run.log = lambda values: None  # type: ignore[method-assign]
    result = SimpleNamespace(top1_rate=0.5, top5_rate=0.9, images=21)
    threads = working_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "evaluate", lambda _, batches, *__: seen.extend([len(list(batches))]) or result)  # type: ignore[func-returns-value]
        run.validate()
        run.validate()
    assert seen == [3, 3]
    assert working_threads() == threads
