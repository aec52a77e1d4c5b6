"""Experiment trackers (TensorBoard, W&B, ...), which receive the metrics in addition to metrics.csv, through Accelerate."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, TensorBoardTracker, get_available_trackers

from pipeline.errors import UserError

PROJECT = "cropfeed"  # the project's name in trackers that have projects


def check_trackers(names: Sequence[str]) -> None:
    """Raise UserError for a tracker that is unknown or not installed. Accelerate would silently leave it out."""
    available = [str(name) for name in get_available_trackers()]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS and name != "none":
            raise UserError(f"unknown tracker {name!r} in `trackers`", f"choose from {', '.join(LOGGER_TYPE_TO_CLASS)}, none")
        if name not in (*available, "none"):
            raise UserError(f"`trackers` {name}: is not installed", f"pip install {name}, or leave it out")


def make_trackers(names: Sequence[str], output: Path, step: int) -> list[str | GeneralTracker]:
    """The trackers, in the form of Accelerator's log_with. TensorBoard writes to `output`/tensorboard and hides what a killed run
    wrote there after `step`.
    """
    board = TensorBoardTracker("tensorboard", output, purge_step=step)
    return [board if name == "tensorboard" else name for name in dict.fromkeys(names) if name != "none"]


def start_trackers(accelerator: Accelerator, config: dict[str, Any], output: Path, run_id: str, step: int) -> None:
    """Start the trackers and store the run's options in them (not in TensorBoard, because config.json lies beside its files).

    The run is named after its folder, `output`, to which W&B also writes its files. If `step` is above 0, W&B continues the run
    with the same `run_id`, and Trackio the run with the same name.
    """
    named = {
        "wandb": {"name": output.name, "dir": str(output), "id": run_id, "resume": "allow"},
        "trackio": {"name": output.name, "resume": "allow" if step else "never"},
    }
    threading.excepthook = _quiet_on_full_disk
    accelerator.init_trackers(PROJECT, init_kwargs=named)
    for tracker in accelerator.trackers:
        if tracker.name != "tensorboard":
            tracker.store_init_configuration(
                {name: value if isinstance(value, int | float) else str(value) for name, value in config.items()}
            )


def _quiet_on_full_disk(error: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread ends with an OSError if the disk is full. The next row reports it; no traceback is needed."""
    if not isinstance(error.exc_value, OSError):
        threading.__excepthook__(error)
