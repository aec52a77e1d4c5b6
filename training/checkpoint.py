"""Checkpoints, written atomically: `last` is a complete checkpoint even if the process is killed while it saves.

RUN/checkpoints/step-00001200/ holds model.safetensors, optimizer.pt and state.json. It is written under a temporary name and
renamed. Then the symbolic links `last` and `best` are replaced, also by renaming, and all other checkpoints are deleted.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipeline.progress import announce_if_slow


def save_checkpoint(
    folder: Path,
    step: int,
    write_weights: Callable[[Path], None],
    optimizer: dict[str, Any],
    state: dict[str, Any],
    best: bool,
) -> None:
    """Save a checkpoint into `folder` (RUN/checkpoints) and point the link `last` to it, and `best` if `best` is true.

    write_weights: writes model.safetensors to the given path. optimizer: tensors and plain values. state: JSON values.
    """
    name = f"step-{step:08d}"
    while (folder / name).exists():  # a checkpoint of this step exists; a folder cannot be replaced atomically
        name += "+"
    temporary = folder / f".{name}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write_weights(temporary / "model.safetensors")
    torch.save(optimizer, temporary / "optimizer.pt")
    (temporary / "state.json").write_text(json.dumps(state), "utf-8")
    for file in temporary.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    temporary.rename(folder / name)
    for link in ("last", "best") if best else ("last",):
        _point(folder / link, name)
    keep = {os.readlink(folder / link) for link in ("last", "best") if (folder / link).is_symlink()}
    for entry in folder.iterdir():
        if not entry.is_symlink() and entry.name not in keep:
            shutil.rmtree(entry, ignore_errors=True)


def load_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The content of optimizer.pt (tensors on the CPU) and of state.json in the checkpoint folder `path`."""
    file = path / "optimizer.pt"
    with announce_if_slow(f"reading {file.stat().st_size / 1e9:.2g} GB from {file}"):
        optimizer = torch.load(file, map_location="cpu", weights_only=True)
    return optimizer, json.loads((path / "state.json").read_text("utf-8"))


def _point(link: Path, target: str) -> None:
    temporary = link.with_name(f".{link.name}.partial")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)
