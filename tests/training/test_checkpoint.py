from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.checkpoints import find_last, problem, resolve, run_weights
from pipeline.errors import StorageError
from tests.helpers import Forked
from training import checkpoint
from training.checkpoint import load_checkpoint, save_checkpoint
from training.metrics import COLUMNS, MetricsFile, read_metrics


def save(folder: Path, step: int, best: bool = False) -> None:
    def write_weights(path: Path) -> None:
        save_file({"weights": torch.tensor([step])}, path)

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
    assert load_file(tmp_path / "last" / "model.safetensors")["weights"].tolist() == [40]


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


@pytest.fixture
def no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)


@pytest.mark.usefixtures("no_links")
def test_a_file_system_without_links_has_text_files(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    save(folder, 10, best=True)
    save(folder, 20)
    assert sorted(path.name for path in folder.iterdir()) == ["best", "last", "step-00000010", "step-00000020"]
    assert (folder / "last").read_text() == "step-00000020\n"
    assert resolve(folder, "last") == find_last(folder) == folder / "step-00000020"
    assert resolve(folder, "best") == folder / "step-00000010"
    assert run_weights(tmp_path, ("best", "last")) == folder / "step-00000010" / "model.safetensors"


def test_a_copy_without_links_goes_on(tmp_path: Path) -> None:
    """The copy's `best` stays until there is a better one; its `last` is replaced."""
    original, copy = tmp_path / "original", tmp_path / "copy"
    save(original, 10, best=True)
    save(original, 20)
    shutil.copytree(original, copy)  # resolves links
    assert not (copy / "last").is_symlink()
    save(copy, 30)
    assert load_checkpoint(copy / "last")[1] == {"step": 30}
    assert load_checkpoint(copy / "best")[1] == {"step": 10}
    save(copy, 40, best=True)
    assert load_checkpoint(copy / "best")[1] == {"step": 40}
    assert sorted(path.name for path in copy.iterdir()) == ["best", "last", "step-00000040"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "state.json"])
def test_the_newest_whole_checkpoint_is_found_without_pointers(tmp_path: Path, name: str) -> None:
    for step in (9, 10, 11):
        save(tmp_path / str(step), step)
        shutil.copytree(tmp_path / str(step) / f"step-{step:08d}", tmp_path / f"step-{step:08d}")
    file = tmp_path / "step-00000011" / name
    file.write_bytes(file.read_bytes()[:-1])
    lines: list[str] = []
    assert find_last(tmp_path, lines.append) == tmp_path / "step-00000010"
    assert lines[0].startswith(f"{tmp_path}/step-00000011: skipped, not a whole checkpoint (")
    assert lines[1:] == [f"{tmp_path}/last: not found; continuing from step-00000010"]


def test_a_pointer_to_an_older_checkpoint_is_obeyed(tmp_path: Path) -> None:
    save(tmp_path, 10, best=True)
    save(tmp_path, 20)
    (tmp_path / "last").unlink()
    (tmp_path / "last").symlink_to("step-00000010")
    assert find_last(tmp_path) == tmp_path / "last"


@pytest.mark.parametrize("content", [b"", b"../../other", b"step-1", b"\xff" * 100])
def test_a_text_file_that_is_no_pointer(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "last").write_bytes(content)
    assert resolve(tmp_path, "last") is None


def test_other_files_beside_checkpoints_stay(tmp_path: Path) -> None:
    for name in ("my backup", "step-10", "step-00000010-good", "last.zip"):
        (tmp_path / name).mkdir()
    save(tmp_path, 10)
    save(tmp_path, 20)
    kept = ["last", "last.zip", "my backup", "step-00000010-good", "step-00000020", "step-10"]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept


def test_a_mount_that_renames_no_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(Path, "rename", refuse)
    monkeypatch.setattr(os, "fsync", refuse)
    save(tmp_path, 10)
    assert problem(tmp_path / "last") is None
    assert load_checkpoint(tmp_path / "last")[1] == {"step": 10}


@pytest.mark.parametrize("file", ["optimizer.pt", "state.json"])
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    save(tmp_path, 10, best=True)
    mkdir = Path.mkdir

    def link_to_full_disk(self: Path, *arguments: bool, **options: bool) -> None:
        mkdir(self, *arguments, **options)
        if self.name.endswith(".partial"):
            os.symlink("/dev/full", self / file)

    monkeypatch.setattr(Path, "mkdir", link_to_full_disk)
    with pytest.raises(StorageError, match=f"{tmp_path}/step-00000020: cannot be written: not enough space on the disk at "):
        save(tmp_path, 20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "last", "step-00000010"]
    assert problem(checkpoint.resolve(tmp_path, "last") or tmp_path) is None


def test_rows_that_a_full_disk_did_not_take_are_written_later(tmp_path: Path) -> None:
    path, aside = tmp_path / "metrics.csv", tmp_path / "aside"
    file = MetricsFile(path, 0)
    file.write({"step": 10, "lr": 1.0})
    path.rename(aside)
    path.symlink_to("/dev/full")
    for step in (20, 30):
        with pytest.raises(StorageError, match=r"metrics\.csv: cannot be written: not enough space"):
            file.write({"step": step, "lr": 1.0})
    aside.replace(path)
    file.write({"step": 40, "lr": 1.0})
    assert [row["step"] for row in read_metrics(path)] == ["10", "20", "30", "40"]
