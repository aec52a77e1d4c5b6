"""The examples run as a user starts them. The training loops resume after a kill with the samples of the plan."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline import LoaderSpec, open_loader
from tests.helpers import ROOT, clean_environment, run_script
from tests.runs import torchrun

STEPS, BATCH, KILLED_AT = 13, 8, 11  # 7 steps are an epoch; checkpoints after every 5 steps

EXAMPLES: dict[str, tuple[str, tuple[str, ...], int]] = {
    # script: the option for what it saves, its launcher, its processes
    "accelerate_loop.py": ("--output", (), 1),
    "ddp.py": ("--checkpoint", torchrun(29655), 2),
    "ffcv_loop.py": ("--checkpoint", (), 1),
    "lightning_module.py": ("--output", (), 1),
    "timm_models.py": ("--checkpoint", ("tests/with_timm.py",), 1),
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
    arguments = [shards, option, tmp_path / "saved", "--steps", STEPS, "--image-size", 32, "--batch-size", BATCH]
    command = [sys.executable, *launcher, str(ROOT / "examples" / script), *map(str, arguments)]

    killed = _samples(command, tmp_path, killed_at=KILLED_AT)
    resumed = _samples(command, tmp_path)

    assert max(step for step, _ in killed) >= KILLED_AT
    assert min(step for step, _ in resumed) == 11, "resumed after another step than 10"
    assert max(step for step, _ in resumed) == STEPS
    with open_loader(LoaderSpec(shards, batch_size=BATCH, engine="cpu")) as loader:
        assert len(loader) == 7
        for (step, rank), samples in (killed | resumed).items():
            epoch, batch = divmod(step - 1, len(loader))
            planned = loader.order.samples(epoch, np.arange(batch * BATCH, (batch + 1) * BATCH))
            assert samples == planned.reshape(processes, -1)[rank].tolist(), f"step {step}"
            if step in (11, 12):
                assert killed.get((step, rank), samples) == samples


def _samples(command: list[str], folder: Path, killed_at: int | None = None) -> dict[tuple[int, int], list[int]]:
    """Run an example, to its end or until it has printed a step. Returns the samples of each (step, rank)."""
    found: dict[tuple[int, int], list[int]] = {}
    errors = folder / "stderr"
    with errors.open("w") as stream, subprocess.Popen(
        command, cwd=folder, env=clean_environment() | {"OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=stream, start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            if match := re.match(r"step (\d+)(?:, rank (\d+))?:.* samples \[(.*)\]", line):
                step, rank, samples = match.groups()
                found[int(step), int(rank or 0)] = [int(sample) for sample in samples.split(",")]
                if int(step) == killed_at and not int(rank or 0):
                    os.killpg(process.pid, signal.SIGKILL)
                    break
        process.stdout.close()
    assert process.returncode == (0 if killed_at is None else -signal.SIGKILL), errors.read_text()
    return found
