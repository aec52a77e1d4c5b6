"""The folder of a run and its config.json, which records options, versions, hardware and data.

RUN/ holds config.json, metrics.csv, tensorboard/, checkpoints/{last,best} and, at the end, model.safetensors.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import sys
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from accelerate import Accelerator

from model.checkpoints import find_last
from pipeline.errors import UserError
from pipeline.loader import Loader
from pipeline.store import files
from training.loaders import scale_of
from training.options import TrainOptions
from training.provenance import commit, environment, hardware, versions

LOCK = ".lock"
log = logging.getLogger("cropfeed")


def check_output(resume: str | None, output: Path) -> bool:
    """Whether to continue from the checkpoint in `output`: with `resume`, and after torchrun has restarted its processes.

    resume: TrainOptions.resume. Raises UserError if there is nothing to resume from, or if a new run would overwrite something.
    """
    folder = output / "checkpoints"
    skipped: list[str] = []
    last = find_last(folder, skipped.append)
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if resume or restarted:
        if last is not None:
            return True
        if damaged := list(folder.glob("*/state.json")):  # to start anew would replace them
            raise UserError(
                skipped[0] if skipped else f"{damaged[0]}: is no checkpoint", "give another `output`, or repair the checkpoint"
            )
        if resume == "last" and not restarted:
            raise UserError(f"{folder / 'last'}: there is no checkpoint to resume from", "start anew with `resume` auto")
    died_early = (restarted or resume == "auto") and (output / "config.json").exists()  # before its first checkpoint
    if output.exists() and any(file.name != LOCK for file in output.iterdir()) and not died_early:
        how = "continue it with `resume`" if last else "start anew with `resume` auto if it is a run that stopped early"
        raise UserError(f"{output}: exists already", f"{how}, or give another `output`")
    return False


def point_latest(output: Path) -> None:
    """Make the symbolic link `latest` beside `output`, unless something else has that name or the file system has no links."""
    latest = output.parent / "latest"
    if output == latest or (latest.exists() and not latest.is_symlink()):
        return
    with suppress(OSError):
        latest.unlink(missing_ok=True)
        latest.symlink_to(output.name)


def lock(output: Path) -> IO[str] | None:
    """Claim the output folder, until the file that is returned is closed or this process ends, however it ends.

    Raises UserError if another training uses the folder. None if the file system has no locks.
    """
    output.mkdir(parents=True, exist_ok=True)
    file = (output / LOCK).open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        raise UserError(f"{output}: {file.read() or 'another training'} writes to it", "choose another `output`") from error
    except OSError as error:
        log.warning("%s: cannot be locked (%s); start no second training there", output, error.strerror)
        file.close()
        return None
    file.truncate(0)
    file.write(f"process {os.getpid()} on host {socket.gethostname()}")
    file.flush()
    return file


def arguments_of(options: TrainOptions) -> dict[str, Any]:
    """The options as in config.json, with the keys that it has had since version 0.1. Newer flags are in its "command"."""
    arguments: dict[str, Any] = {"list": None} | asdict(options)
    for newer in ("verify", "interpolation", "read_timeout", "compress_gradients"):
        del arguments[newer]
    return arguments


def write_config(output: Path, options: TrainOptions, accelerator: Accelerator, loader: Loader, step: int) -> str:
    """Write RUN/config.json, with an entry for each start of the run. Returns the run's id, which all its starts share.

    step: where this start begins.
    """
    path = output / "config.json"
    before = json.loads(path.read_text("utf-8")) if step and path.exists() else {}
    run_id: str = before.get("id") or uuid4().hex
    start = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": step,
        "processes": accelerator.num_processes,
        "commit": commit(),
    }
    manifest = loader.shards.manifest
    config = {
        "id": run_id,
        "command": sys.argv,
        "arguments": arguments_of(options) | {"scale": scale_of(loader.spec.geometry)},
        "precision": accelerator.mixed_precision,
        "processes": accelerator.num_processes,
        "engine": loader.engine,
        "commit": start["commit"],
        "versions": versions(),
        "hardware": hardware(),
        "data": {"fingerprint": manifest.fingerprint, "classes": len(loader.classes), "images": len(loader.shards)},
        "environment": environment(),
        "starts": [*before.get("starts", []), start],
    }
    files.write(str(path), json.dumps(config, indent=1, default=str).encode())
    return run_id
