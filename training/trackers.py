"""Where figures go beside metrics.csv: Accelerate's trackers, by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, TensorBoardTracker, get_available_trackers

from pipeline.errors import UserError

PROJECT = "cropfeed"  # for those that have projects


def check_trackers(names: Sequence[str]) -> None:
    """Raise UserError for a tracker that is unknown or not installed; Accelerate would go on without it."""
    available = [str(name) for name in get_available_trackers()]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS and name != "none":
            raise UserError(f"unknown tracker {name!r} in --trackers; choose from {', '.join(LOGGER_TYPE_TO_CLASS)}, none")
        if name not in (*available, "none"):
            raise UserError(f"--trackers {name}: is not installed; pip install {name}, or leave it out")


def make_trackers(names: Sequence[str], output: Path, step: int) -> list[str | GeneralTracker]:
    """What Accelerator's log_with takes. TensorBoard's files go to `output`/tensorboard; what a killed run wrote there after
    `step` is hidden.
    """
    board = TensorBoardTracker("tensorboard", output, purge_step=step)
    return [board if name == "tensorboard" else name for name in dict.fromkeys(names) if name != "none"]


def start_trackers(accelerator: Accelerator, config: dict[str, Any], output: Path, run_id: str, step: int) -> None:
    """Begin, and give the trackers that have projects the run's options; TensorBoard has config.json beside it. The run is named
    after its folder, `output`, which W&B's files go to. A run that goes on at a `step` goes on in W&B and Trackio: there by
    `run_id`, here by its name.
    """
    named = {
        "wandb": {"name": output.name, "dir": str(output), "id": run_id, "resume": "allow"},
        "trackio": {"name": output.name, "resume": "allow" if step else "never"},
    }
    accelerator.init_trackers(PROJECT, init_kwargs=named)
    for tracker in accelerator.trackers:
        if tracker.name != "tensorboard":
            tracker.store_init_configuration(
                {name: value if isinstance(value, int | float) else str(value) for name, value in config.items()}
            )
