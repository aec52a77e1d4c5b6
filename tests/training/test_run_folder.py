"""The output folder: its lock, and the link to the latest run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import UserError
from tests.helpers import ROOT, clean_environment
from training.run_folder import check_output, lock, point_latest

HOLD = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from training.run_folder import lock
held = lock(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


def test_an_output_has_one_training_at_a_time(tmp_path: Path) -> None:
    """A lock ends with its process, even if that is killed."""
    program = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(program, env=clean_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match=f"process {holder.pid} on host .* writes to it"):
            lock(tmp_path)
        assert not check_output(None, tmp_path)  # a lock alone is no run
        holder.kill()
    held = lock(tmp_path)
    assert held is not None
    held.seek(0)
    assert held.read().startswith(f"process {os.getpid()} on host ")
    held.close()


def test_a_run_that_stopped_before_its_first_checkpoint(tmp_path: Path) -> None:
    """Both ways to start it again lead to the one that works."""
    (tmp_path / "config.json").write_text("{}")
    for resume in (None, "last"):
        with pytest.raises(UserError, match="start anew with `resume` auto"):
            check_output(resume, tmp_path)
    assert not check_output("auto", tmp_path)


def test_latest_points_to_a_run(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        point_latest(tmp_path / name)
        assert (tmp_path / "latest").resolve() == tmp_path / name
    point_latest(tmp_path / "latest")  # no link to itself
    assert (tmp_path / "latest").resolve() == tmp_path / "second"


def test_a_folder_named_latest_is_kept(tmp_path: Path) -> None:
    (tmp_path / "latest").mkdir()
    (tmp_path / "run").mkdir()
    point_latest(tmp_path / "run")
    assert not (tmp_path / "latest").is_symlink()


def test_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    point_latest(tmp_path / "run")
    assert not (tmp_path / "latest").exists()


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    assert lock(tmp_path) is None
    assert caplog.messages == [f"{tmp_path}: cannot be locked (Operation not supported); start no second training there"]


def test_a_run_whose_checkpoints_are_damaged_is_not_started_anew(tmp_path: Path) -> None:
    """It would replace what somebody may repair."""
    path = tmp_path / "checkpoints" / "step-00000010"
    path.mkdir(parents=True)
    (tmp_path / "config.json").write_text("{}")
    for resume in ("auto", "last"):
        (path / "state.json").write_text("{")
        with pytest.raises(UserError, match="step-00000010: skipped, not a whole checkpoint"):
            check_output(resume, tmp_path)
    (path / "state.json").unlink()  # never finished
    assert not check_output("auto", tmp_path)
