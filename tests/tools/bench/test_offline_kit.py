"""tools/bench/offline_kit.py, with a pip that writes small files."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from tests.helpers import ROOT
from tools.bench import offline_kit

run = subprocess.run


def fake_pip(monkeypatch: pytest.MonkeyPatch, missing: str = "") -> list[list[str]]:
    """Replace pip: wheels are made of their name. Returns the list to which each call of pip is appended."""
    calls: list[list[str]] = []

    def started(command: list[str], **options: Any) -> Any:
        if "pip" not in command:
            return run(command, **options)
        calls.append(command)
        folder, package = Path(command[command.index("--dest") + 1]), command[-1]
        if package == missing:
            return subprocess.CompletedProcess(command, 1, "", "WARNING: Retrying\nERROR: No matching distribution found\n")
        (folder / f"{package}-1-py3-none-any.whl").write_bytes(5 * package.encode())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(offline_kit.subprocess, "run", started)
    return calls


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a git checkout")
def test_the_printed_commands_restore_all_wheels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commands run in a shell, up to the installation."""
    monkeypatch.setattr(offline_kit, "PART", 60)
    calls = fake_pip(monkeypatch)
    wheels = [package for package in offline_kit.WHEELS if package not in offline_kit.PRESENT]
    offline_kit.make_kit(tmp_path / "kit", "3.12", wheels)
    assert [call[-1] for call in calls] == wheels
    assert all(call[call.index("--python-version") + 1] == "3.12" and "--no-deps" in call for call in calls)
    assert (wheels[0], wheels[-1]) == ("simplejpeg", "nvidia-dali-cuda130")
    printed = capsys.readouterr().out
    listed = re.findall(r"^# +[\d.]+ MB  (\S+)$", printed, re.MULTILINE)
    assert listed[1] == "simplejpeg-1-py3-none-any.whl"
    assert listed[-2:] == [f"nvidia-dali-cuda130-1-py3-none-any.whl.part-0{number}" for number in (0, 1)]
    commands = printed[printed.index("# On the GPU machine") :]
    before, installs = commands.split("python3.12", 1)
    shown = run(["sh", "-e", "-c", before], cwd=tmp_path / "kit", capture_output=True, text=True, check=True).stdout
    assert shown.count(": OK") == len(listed)
    for package in wheels:
        assert (tmp_path / "kit" / f"{package}-1-py3-none-any.whl").read_bytes() == 5 * package.encode()
    assert (tmp_path / "kit" / "cropfeed" / "tools" / "bench" / "gpu_check.py").exists()
    assert "--no-index --no-deps" in installs


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a git checkout")
def test_what_cannot_be_downloaded_is_named_and_full_folders_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch, missing="scipy")
    with pytest.raises(UserError, match=r"scipy cannot be downloaded for Python 3.12 .*No matching distribution"):
        offline_kit.make_kit(tmp_path / "kit", "3.12", ["simplejpeg", "scipy"])
    with pytest.raises(UserError, match="is not empty"):
        offline_kit.make_kit(tmp_path / "kit", "3.12", [])


def test_every_wheel_has_a_pinned_version() -> None:
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert {name.lower().replace("_", "-") for name in pinned} >= set(offline_kit.WHEELS)
