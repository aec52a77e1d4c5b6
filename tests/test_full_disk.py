"""A disk that becomes full: what was finished stays, and one line says what to do. Needs root, to mount a small disk."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.helpers import assert_refused, run_forked, run_script, without_progress
from tests.runs import arguments

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_core")]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A function that mounts an empty disk of so many kB."""
    with ExitStack() as mounted:

        def mount(size: int) -> Path:
            place = tmp_path / f"disk{size}"
            place.mkdir()
            command = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(place)]
            if subprocess.run(command, capture_output=True, check=False).returncode:
                pytest.skip("mounting a disk needs root")
            mounted.callback(subprocess.run, ["umount", "--lazy", str(place)], check=True)
            return place

        yield mount


def test_a_conversion_names_the_disk_and_is_resumed(image_folder: Path, disk: Callable[[int], Path]) -> None:
    place = disk(3000)  # the record of a shard has sums of 1.2 MB
    command = ["tools/make_shards.py", image_folder, "--out", place / "out", "--shard-size", 8, "--workers", 1]
    result = without_progress(run_script(*command))
    assert_refused(result, f"not enough space on the disk at {place}", "then repeat the command: finished shards are kept")
    records = [path.stem.split("-") for path in place.glob("out/conversion/*.npz")]
    finished = {path: path.stat().st_mtime_ns for path in (place / "out" / split / f"{shard}.tar" for split, shard in records)}
    assert finished
    assert not list(place.rglob("*.partial"))
    subprocess.run(["mount", "-o", "remount,size=40m", str(place)], check=True)
    assert run_script(*command).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in finished} == finished


def test_a_training_goes_on_and_says_what_is_not_saved(small_shards: Path, disk: Callable[[int], Path]) -> None:
    """The weights of resnet20 take 1.1 MB."""
    place = disk(600)
    result = run_forked("train.py", *arguments(small_shards, place / "run", "--epochs", 1, "--trackers", "none"))
    assert result.returncode == 2
    lines = result.stderr.replace("\r", "\n").splitlines()
    assert lines[-1].startswith(
        f"error: {place}/run/model.safetensors: cannot be written: not enough space on the disk at {place}"
    )
    assert "there is no checkpoint" in lines[-1]
    assert f"the checkpoint of step 3 is not saved: {place}/run" in result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert len((place / "run" / "metrics.csv").read_text().splitlines()) == 1 + 7 + 1  # header, steps, validation


def test_an_evaluation_prints_its_figures_first(small_shards: Path, finished: Path, disk: Callable[[int], Path]) -> None:
    place = disk(4)
    (place / "full").write_bytes(bytes(4096))
    result = without_progress(run_script("tools/evaluate.py", finished, "--data", small_shards, "--json", place / "out.json"))
    assert_refused(result, f"{place}/out.json", f"not enough space on the disk at {place}")
    assert "top-1" in result.stdout
