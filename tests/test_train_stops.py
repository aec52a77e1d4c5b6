"""Runs that are stopped or killed, that diverge, or that are resumed: what they save, and that they end as if uninterrupted."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pipeline.plan import sampling
from pipeline.store.shards import ShardSet
from tests.helpers import ROOT, Forked, assert_refused, clean_environment, run_forked, without_progress
from tests.runs import (
    EPOCHS,
    STEPS,
    arguments,
    assert_checkpoints_are_complete,
    assert_same_result,
    metrics,
    torchrun,
    traces,
    wait_for_rows,
)
from training.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("one_core")

TORCHRUN = torchrun(29612)


@pytest.mark.slow
def test_a_run_killed_20_times_ends_bit_identical(small_shards: Path, finished: Path, tmp_path: Path) -> None:
    """Every second kill comes while a checkpoint is written, before one of its renames and fsyncs."""
    rng = random.Random(4)
    run, trace = tmp_path / "run", tmp_path / "trace"
    command = ["tests/traced_train.py", *arguments(small_shards, run, "--resume", "auto")]
    kills, step = 0, 0
    while kills < 20:
        is_near_the_end = step > (EPOCHS - 1) * STEPS
        if kills % 2:
            process = Forked(*command, TRACE=str(trace), KILL_AT=str(rng.randint(1, 5 if is_near_the_end else 14)))
        else:
            process = Forked(*command, TRACE=str(trace))
            wait_for_rows(run, 1 if is_near_the_end else rng.randint(1, 3), lambda: True)
            time.sleep(rng.uniform(0, 0.02))
            process.kill()
        result = process.wait()
        assert result.returncode == -signal.SIGKILL, result.stderr
        kills += 1
        assert not (run / "model.safetensors").exists()
        step, before = assert_checkpoints_are_complete(run), step
        assert step >= before
        shutil.rmtree(run / "tensorboard", ignore_errors=True)
    assert step > 0
    result = run_forked(*command, TRACE=str(trace))
    assert result.returncode == 0, result.stderr
    assert_same_result(run, trace, finished)


def test_sigterm_saves_a_checkpoint_and_exits_with_0(small_shards: Path, finished: Path, tmp_path: Path) -> None:
    """SIGTERM comes during a step, then during a validation, which is repeated. No step is lost or repeated."""
    run, trace = tmp_path / "run", tmp_path / "trace"
    command = ["tests/traced_train.py", *arguments(small_shards, run, "--resume", "auto")]
    process = Forked(*command, TRACE=str(trace))
    wait_for_rows(run, 9, lambda: True)
    process.kill(signal.SIGTERM)
    result = process.wait()
    assert result.returncode == 0, result.stderr
    step = assert_checkpoints_are_complete(run)
    assert step >= 9
    assert f"stopped at step {step} on SIGTERM and saved a checkpoint; continue with --resume" in result.stdout
    assert not (run / "model.safetensors").exists()

    result = run_forked(*command, TRACE=str(trace), TERM_IN_VALIDATION="1")
    assert result.returncode == 0, result.stderr
    step = assert_checkpoints_are_complete(run)
    assert step % STEPS == 0
    assert metrics(run)[-1][3] == ""  # not validated
    shutil.rmtree(run / "tensorboard")
    result = run_forked(*command, TRACE=str(trace))
    assert result.returncode == 0, result.stderr
    assert_same_result(run, trace, finished)


def test_a_non_finite_loss_stops_the_run_and_lists_the_images(small_shards: Path, tmp_path: Path) -> None:
    """The first update is so large that the loss of the second step is not finite. The run notices that when it writes the next
    row. The last checkpoint is older.
    """
    run = tmp_path / "run"
    options = [*arguments(small_shards, run), "--lr", 1e30, "--log-every", 5, "--checkpoint-every", 1]
    result = without_progress(run_forked("train.py", *options))
    assert_refused(
        result, f"the loss of step 1 is not finite; the images of that step are listed in {run}/not-finite.json", "lower --lr"
    )
    found = json.loads((run / "not-finite.json").read_text())
    assert (found["step"], found["epoch"]) == (1, 0)
    assert found["ids"] == sampling.order(0, 0, range(8, 16), 60).tolist()
    shards = ShardSet(small_shards, "train")
    assert found["images"] == [shards.locate(sample) for sample in found["ids"]]
    assert assert_checkpoints_are_complete(run) == 1


@pytest.mark.slow
def test_a_run_resumes_on_two_processes_and_restarts_after_a_rank_died(
    small_shards: Path, finished: Path, tmp_path: Path
) -> None:
    """torchrun restarts both processes, and they continue. On SIGTERM they save. The batches are those of a single process."""
    run, trace = tmp_path / "run", tmp_path / "trace"
    process = Forked("tests/traced_train.py", *arguments(small_shards, run), TRACE=str(trace))
    wait_for_rows(run, 8, lambda: True)
    process.kill()
    process.wait()
    shutil.rmtree(run / "tensorboard")
    two = subprocess.Popen(
        [sys.executable, *TORCHRUN, "--max-restarts", "1", "--monitor-interval", "0.2", str(ROOT / "tests" / "traced_train.py"),
         *arguments(small_shards, run, "--resume")],
        env=clean_environment() | {"TRACE": str(trace), "ACCELERATE_USE_CPU": "true"}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/tmp",
    )  # fmt: skip
    try:
        wait_for_rows(run, 4, lambda: two.poll() is None)
        (second,) = trace.parent.glob("trace.*.1")
        shutil.rmtree(run / "tensorboard")
        os.kill(int(second.suffixes[-2][1:]), signal.SIGKILL)
        died = time.monotonic()
        wait_for_rows(run, 4, lambda: two.poll() is None)
        assert time.monotonic() - died < 60
        two.send_signal(signal.SIGTERM)
        output = two.communicate(timeout=60)[0]
    finally:
        if two.poll() is None:
            os.killpg(two.pid, signal.SIGKILL)
    stopped = re.search(r"stopped at step (\d+) on SIGTERM", output)
    assert stopped is not None, output
    assert assert_checkpoints_are_complete(run) == int(stopped[1])
    assert len(list(trace.parent.glob("trace.*.1"))) == 2
    result = run_forked("tests/traced_train.py", *arguments(small_shards, run, "--resume"), TRACE=str(trace))
    assert result.returncode == 0, result.stderr
    assert traces(trace) == traces(finished.parent / "trace")
    assert [row[0] for row in metrics(run)] == [row[0] for row in metrics(finished)]
    losses, expected = ([float(row[2]) for row in metrics(one) if row[2]] for one in (run, finished))
    assert sum(losses[-STEPS:]) == pytest.approx(sum(expected[-STEPS:]), rel=0.5)  # the curve continues, but is not bit-identical


def test_a_run_that_ends_within_an_epoch_resumes_there(small_shards: Path, finished: Path, tmp_path: Path) -> None:
    """10 steps with 7 per epoch, then up to step 14 with --resume. The batches are those of a run with --epochs."""
    run, trace = tmp_path / "run", tmp_path / "trace"
    options = arguments(small_shards, run)
    at = options.index("--epochs")
    options[at : at + 2] = ["--iterations", "10"]
    result = run_forked("tests/traced_train.py", *options, "--milestones", 8, TRACE=str(trace))
    assert result.returncode == 0, result.stderr
    rows = read_metrics(run / "metrics.csv")
    assert [float(row["lr"]) for row in rows if row["lr"]] == pytest.approx([0.01] * 8 + [0.001] * 2)
    assert [int(row["step"]) for row in rows if row["val_top1"]] == [7, 10]
    assert (run / "checkpoints" / "last").resolve().name == "step-00000010"
    options[at + 1] = "14"
    result = run_forked("tests/traced_train.py", *options, "--resume", TRACE=str(trace))
    assert result.returncode == 0, result.stderr
    assert [int(row["step"]) for row in read_metrics(run / "metrics.csv") if row["val_top1"]] == [7, 10, 14]
    expected = traces(finished.parent / "trace")
    assert traces(trace) == {place: expected[place] for place in sorted(expected)[:14]}


@pytest.mark.slow
def test_a_plateau_divides_the_rate_and_a_resumed_run_remembers_it(small_shards: Path, tmp_path: Path) -> None:
    """With a negligible learning rate the error never improves, so every second validation after the first one divides the
    rate."""
    run = tmp_path / "run"
    options = [*arguments(small_shards, run, "--schedule", "plateau", "--patience", 1), "--lr", 1e-9, "--epochs"]
    for epochs, more in ((4, ()), (7, ("--resume",))):
        result = run_forked("train.py", *options, epochs, *more)
        assert result.returncode == 0, result.stderr
    rows = read_metrics(run / "metrics.csv")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1e-9)
    reference = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1, eps=0)
    expected = []
    for row in rows:
        if row["val_top1"]:
            reference.step(1 - float(row["val_top1"]))
        else:
            expected.append(optimizer.param_groups[0]["lr"])
    assert [float(row["lr"]) for row in rows if row["lr"]] == pytest.approx(expected, rel=1e-6, abs=0)
    assert expected[-1] < 2e-11 < expected[0]


def test_resuming_on_data_with_other_classes_is_refused(image_folder: Path, finished: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("n00000000", "n00000001"):
            shutil.copytree(image_folder / split / name, tmp_path / "images" / split / name)
    assert run_forked("tools/make_shards.py", tmp_path / "images", "--out", tmp_path / "shards").returncode == 0
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    result = run_forked("train.py", *arguments(tmp_path / "shards", finished, "--resume"))
    assert_refused(result, "its 3 classes differ from the 2 of", "class 2 is 'n00000002', in the data missing")
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before
