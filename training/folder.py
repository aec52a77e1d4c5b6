"""A run's folder: whether it may be written to, and config.json, which says what was run, with what, on what.

RUN/ holds config.json, metrics.csv, tensorboard/, checkpoints/{last,best} and, at the end, model.safetensors.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from accelerate import Accelerator

from pipeline.errors import UserError
from pipeline.loader import Loader
from pipeline.store import files
from training.loaders import scale_of
from training.provenance import commit, environment, hardware, versions


def check_output(args: Any, output: Path) -> bool:
    """Whether the run goes on from a checkpoint: with --resume, and after torchrun has started its processes again.

    Raises UserError where there is nothing to resume, or something that a new run would overwrite.
    """
    last = output / "checkpoints" / "last"
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if args.resume or restarted:
        if last.exists():
            return True
        if args.resume == "last" and not restarted:
            raise UserError(f"{last}: no checkpoint to resume from; start without --resume")
    is_ours = (restarted or args.resume == "auto") and (output / "config.json").exists()  # it died before its first checkpoint
    if output.exists() and any(output.iterdir()) and not is_ours:
        raise UserError(f"{output}: exists already; continue it with --resume, or give another --output")
    return False


def write_config(output: Path, args: Any, accelerator: Accelerator, loader: Loader, step: int) -> str:
    """RUN/config.json, with a line for each start of the run; returns the run's id, the same for all starts. step: where this
    one begins.
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
        "arguments": vars(args) | {"scale": scale_of(loader.spec.geometry)},
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
