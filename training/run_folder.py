"""The folder of a run and its config.json, which records options, versions, hardware and data.

RUN/ holds config.json, metrics.csv, tensorboard/, checkpoints/{last,best} and, at the end, model.safetensors.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

from accelerate import Accelerator

from pipeline.errors import UserError
from pipeline.loader import Loader
from pipeline.store import files
from training.loaders import scale_of
from training.options import TrainOptions
from training.provenance import commit, environment, hardware, versions


def check_output(resume: str | None, output: Path) -> bool:
    """Whether to continue from the checkpoint in `output`: with `resume`, and after torchrun has restarted its processes.

    resume: TrainOptions.resume. Raises UserError if there is nothing to resume from, or if a new run would overwrite something.
    """
    last = output / "checkpoints" / "last"
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if resume or restarted:
        if last.exists():
            return True
        if resume == "last" and not restarted:
            raise UserError(f"{last}: there is no checkpoint to resume from", "start without `resume`")
    died_early = (restarted or resume == "auto") and (output / "config.json").exists()  # before its first checkpoint
    if output.exists() and any(output.iterdir()) and not died_early:
        raise UserError(f"{output}: exists already", "continue it with `resume`, or give another `output`")
    return False


def write_config(output: Path, options: TrainOptions, accelerator: Accelerator, loader: Loader, step: int) -> str:
    """Write RUN/config.json, with an entry for each start of the run. Returns the run's id, which all its starts share.

    step: where this start begins.
    """
    path = output / "config.json"
    before = json.loads(path.read_text()) if step and path.exists() else {}
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
        # "list" is a key that the file has had since version 0.1.
        "arguments": {"list": None} | asdict(options) | {"scale": scale_of(loader.spec.geometry)},
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
