"""The examples run as a user starts them. The training loops resume after a kill with the samples of the plan."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest

from pipeline import LoaderSpec, open_loader
from tests.helpers import ROOT, clean_environment, run_script
from tests.runs import torchrun

BATCH = 8  # 7 steps are an epoch
SAVED = 5  # steps between two checkpoints
KILLED = 11  # at this step or soon after it

EXAMPLES: dict[str, tuple[str, tuple[str, ...], int]] = {
    # script: the option for what it saves, its launcher, its processes
    "accelerate_loop.py": ("--output", (), 1),
    "ddp.py": ("--checkpoint", torchrun(29655), 2),
    "ffcv_loop.py": ("--checkpoint", (), 1),
    "lightning_module.py": ("--output", (), 1),
    "timm_models.py": ("--checkpoint", (str(ROOT / "tests/with_timm.py"),), 1),
    "transformers_trainer.py": ("--output", (), 1),
}


@pytest.mark.slow
def test_quickstart() -> None:
    """The classes differ in color, so the model learns them."""
    result = run_script("examples/quickstart.py")
    assert result.returncode == 0, result.stderr
    assert "the next batch is the same" in result.stdout
    found = re.search(r"(\d+)% of 48 validation images classified correctly", result.stdout)
    assert found, result.stdout
    assert int(found[1]) >= 95


@pytest.mark.slow
def test_multi_label() -> None:
    """Tags of other samples, or in another order, could not be learned: at random, half of them are right."""
    result = run_script("examples/multi_label.py")
    assert result.returncode == 0, result.stderr
    found = re.search(r"(\d+)% of 192 tags of validation images are right", result.stdout)
    assert found, result.stdout
    assert int(found[1]) >= 90


@pytest.fixture(scope="module")
def shards(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images as tars and as .beton files."""
    out = tmp_path_factory.mktemp("examples") / "shards"
    result = run_script("tools/make_shards.py", image_folder, "--out", out, "--format", "both")
    assert result.returncode == 0, result.stderr
    return out


@pytest.mark.slow
@pytest.mark.parametrize("script", EXAMPLES)
def test_training_loop_resumes_with_the_samples_of_the_plan(script: str, shards: Path, tmp_path: Path) -> None:
    option, launcher, processes = EXAMPLES[script]
    arguments = [shards, option, tmp_path / "saved", "--image-size", 32, "--batch-size", BATCH, "--steps"]
    command = [sys.executable, *launcher, str(ROOT / "examples" / script), *map(str, arguments)]

    killed = _samples([*command, "100000"], tmp_path, killed=True)
    last = max(step for step, _ in killed)
    resumed = _samples([*command, str(last + 2)], tmp_path, killed=False)

    first = min(step for step, _ in resumed)
    assert first % SAVED == 1
    assert last - SAVED <= first <= last + 1
    assert max(step for step, _ in resumed) == last + 2
    with open_loader(LoaderSpec(shards, batch_size=BATCH, engine="cpu")) as loader:
        assert len(loader) == 7
        for (step, rank), samples in [*killed.items(), *resumed.items()]:
            epoch, batch = divmod(step - 1, len(loader))
            planned = loader.order.samples(epoch, np.arange(batch * BATCH, (batch + 1) * BATCH))
            assert samples == planned.reshape(processes, -1)[rank].tolist(), f"step {step}"


def _samples(command: list[str], folder: Path, killed: bool) -> dict[tuple[int, int], list[int]]:
    """Run an example, to its end or until it is killed. Returns the samples of each (step, rank)."""
    found: dict[tuple[int, int], list[int]] = {}
    errors = folder / "stderr"
    with errors.open("w") as stream, subprocess.Popen(
        command, cwd=folder, env=clean_environment() | {"OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=stream,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            # Processes share the pipe, so a line may hold the output of two.
            for step, rank, samples in re.findall(r"step (\d+)(?:, rank (\d+))?:[^\[]* samples \[([\d, ]+)\]", line):
                found[int(step), int(rank or 0)] = [int(sample) for sample in samples.split(",")]
                if killed and int(step) == KILLED:
                    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
                        with suppress(psutil.NoSuchProcess):
                            one.kill()
    assert process.returncode == (-signal.SIGKILL if killed else 0), errors.read_text()
    return found
