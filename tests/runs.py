"""Short runs of train.py, and helpers to inspect them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from model.weights import load_weights
from training.checkpoint import load_checkpoint
from training.metrics import read_metrics

EPOCHS, STEPS = 5, 7  # 60 images in batches of 8


def torchrun(port: int) -> tuple[str, ...]:
    """The launcher of two processes. port: each test file needs another one, because files run in parallel."""
    return ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port))


def arguments(data: Path, output: Path, *more: Any) -> list[str]:
    options = [
        "--data", data, "--output", output, "--arch", "resnet20", "--epochs", EPOCHS, "--batch-size", 8, "--image-size", 32,
        "--scale", 36, 68, "--lr", 0.01, "--threads", 1, "--log-every", 1, "--checkpoint-every", 3, *more,
    ]  # fmt: skip
    return [str(option) for option in options]


def steps_logged(run: Path) -> int:
    path = run / "metrics.csv"
    return sum(bool(row["train_loss"]) for row in read_metrics(path)) if path.exists() else 0


def wait_for_rows(run: Path, rows: int, is_running: Callable[[], bool]) -> None:
    """Wait until metrics.csv has `rows` more training rows than now."""
    deadline = time.monotonic() + 120
    target = None
    while target is None or steps_logged(run) < target:
        assert is_running()
        assert time.monotonic() < deadline
        # A resumed run first truncates metrics.csv to its checkpoint. Start counting after that.
        if target is None and list(run.glob("tensorboard/*tfevents*")):
            target = min(steps_logged(run) + rows, EPOCHS * STEPS - 1)
        time.sleep(0.005)


def traces(stem: Path) -> dict[tuple[int, int], dict[str, Any]]:
    """Global batches by position: ids and draws, concatenated over ranks. Asserts that repeated batches are equal."""
    parts: dict[tuple[int, int], dict[str, dict[int, dict[str, Any]]]] = {}
    for path in stem.parent.glob(stem.name + ".*"):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            process = path.name.split(".")[-2] if row["rank"] == 0 else "other"
            parts.setdefault((row["epoch"], row["consumed"]), {}).setdefault(process, {})[row["rank"]] = row
    found = {}
    for place, processes in parts.items():
        batches = []
        others = processes.pop("other", {})
        for ranks in processes.values():
            together = [ranks[0]] if len(ranks[0]["ids"]) == 8 else [ranks[0], others[1]]
            ids = [index for row in together for index in row["ids"]]
            draws = [[value for row in together for value in row["draws"][field]] for field in range(3)]
            batches.append({"ids": ids, "draws": draws})
        assert all(batch == batches[0] for batch in batches), place
        found[place] = batches[0]
    return found


def metrics(run: Path) -> list[tuple[str, ...]]:
    return [(row["step"], row["lr"], row["train_loss"], row["val_top1"]) for row in read_metrics(run / "metrics.csv")]


def assert_same_result(run: Path, trace: Path, finished: Path) -> None:
    """Assert that the run's weights, metrics and batches are bit-identical to those of the uninterrupted run."""
    weights, expected = load_file(run / "model.safetensors"), load_file(finished / "model.safetensors")
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert metrics(run) == metrics(finished)
    assert traces(trace) == traces(finished.parent / "trace")


def assert_checkpoints_are_complete(run: Path) -> int:
    """Assert that the checkpoints `last` and `best` can be read. Returns the step of `last`, 0 if there is none."""
    for link in (run / "checkpoints").glob("[lb]*"):
        _, state = load_checkpoint(link)
        load_weights(link / "model.safetensors")
        assert f"step-{state['progress']['step']:08d}" in link.resolve().name
    last = run / "checkpoints" / "last"
    return int(load_checkpoint(last)[1]["progress"]["step"]) if last.exists() else 0
