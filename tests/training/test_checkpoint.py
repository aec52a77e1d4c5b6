from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import Forked
from training.checkpoint import load_checkpoint, save_checkpoint
from training.metrics import COLUMNS, MetricsFile, read_metrics


def save(folder: Path, step: int, best: bool = False) -> None:
    def write_weights(path: Path) -> None:
        path.write_text(f"weights {step}")

    save_checkpoint(
        folder,
        step,
        write_weights,
        {"momentum": torch.full((2,), step)},
        {"step": step},
        best,
    )


def test_last_and_best_are_kept_and_the_rest_removed(tmp_path: Path) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20, best=True)
    save(tmp_path, 30)
    save(tmp_path, 40)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "last", "step-00000020", "step-00000040"]
    optimizer, state = load_checkpoint(tmp_path / "last")
    assert state == {"step": 40}
    assert optimizer["momentum"].tolist() == [40, 40]
    assert load_checkpoint(tmp_path / "best")[1] == {"step": 20}
    assert (tmp_path / "last" / "model.safetensors").read_text() == "weights 40"


def test_saving_a_step_again_replaces_its_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 10, best=True)
    save(tmp_path, 10, best=True)
    assert len(list(tmp_path.iterdir())) == 3
    assert load_checkpoint(tmp_path / "last")[1] == {"step": 10}


SAVER = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from training.checkpoint import save_checkpoint
for step in range(1, 100000):
    data = {"tensor": torch.full((50000,), step)}
    save_checkpoint(Path(sys.argv[1]), step, lambda path: save_file(data, path), data, {"step": step}, step % 3 == 0)
    print(step, flush=True)
"""


@pytest.mark.slow
def test_the_last_checkpoint_is_complete_whenever_the_process_is_killed(tmp_path: Path) -> None:
    reached = 0
    script, folder = tmp_path / "saver.py", tmp_path / "checkpoints"
    script.write_text(SAVER)
    for trial in range(20):
        process = Forked(script, folder)
        while not (folder / "last").exists():
            time.sleep(0.005)
        time.sleep(0.03 + 0.017 * trial)
        process.kill()
        printed = process.wait().stdout.split()
        optimizer, state = load_checkpoint(folder / "last")
        weights = load_file(folder / "last" / "model.safetensors")
        assert state["step"] >= int(printed[-1] if printed else 1)
        assert bool((optimizer["tensor"] == state["step"]).all())
        assert bool((weights["tensor"] == state["step"]).all())
        reached = max(reached, state["step"])
    assert reached > 1


def test_metrics_after_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    file = MetricsFile(path, 0)
    for step in (10, 20, 30):
        file.write({"step": step, "train_loss": step / 10})
    with path.open("a") as stream:
        stream.write("40,1.0,2")  # killed while writing a row
    MetricsFile(path, 20).write({"step": 30, "val_top1": 0.5})
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == ["10", "20", "30"]
    assert rows[2]["train_loss"] == ""
    assert rows[2]["val_top1"] == "0.5"
    assert path.read_text().splitlines()[0] == ",".join(COLUMNS)
