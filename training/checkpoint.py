"""Checkpoints, written atomically: `last` is a complete checkpoint even if the process is killed while it saves.

RUN/checkpoints/step-00001200/ is written under a temporary name and renamed. Then the links `last` and `best` are replaced, also
by renaming, and all other checkpoints are deleted. `model.checkpoints` describes their form and finds them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from model.checkpoints import NAME, OPTIMIZER, STATE, WEIGHTS, resolve
from pipeline.errors import writing
from pipeline.progress import announce_if_slow
from pipeline.store.files import sync

_TEMPORARY = re.compile(rf"\.{NAME.pattern}\.partial|\.(last|best)\.(partial|old)")


def save_checkpoint(
    folder: Path,
    step: int,
    write_weights: Callable[[Path], None],
    optimizer: dict[str, Any],
    state: dict[str, Any],
    best: bool,
) -> None:
    """Save a checkpoint into `folder` (RUN/checkpoints) and point the link `last` to it, and `best` if `best` is true.

    write_weights: writes model.safetensors to the given path. optimizer: tensors and plain values. state: JSON values. Raises
    StorageError if the disk is full or fails; the earlier checkpoints remain.
    """
    name = f"step-{step:08d}"
    while (folder / name).exists():  # a checkpoint of this step exists; a folder cannot be replaced atomically
        name += "+"
    temporary = folder / f".{name}.partial"
    with writing(folder / name):
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            write_weights(temporary / WEIGHTS)
            with (temporary / OPTIMIZER).open("wb") as stream:  # torch hides the errors of files that it opens itself
                torch.save(optimizer, stream)
            (temporary / STATE).write_text(json.dumps(state), "utf-8")
            for file in temporary.iterdir():
                with file.open("rb") as stream:
                    sync(stream)
            _rename(temporary, folder / name)
            for link in ("last", "best") if best else ("last",):
                _point(folder / link, name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    keep = {path.resolve() for path in (resolve(folder, "last"), resolve(folder, "best")) if path}
    for entry in folder.iterdir():
        is_old = NAME.fullmatch(entry.name) and entry.resolve() not in keep
        if (is_old or _TEMPORARY.fullmatch(entry.name)) and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)


def load_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The content of optimizer.pt (tensors on the CPU) and of state.json in the checkpoint folder `path`."""
    file = path / OPTIMIZER
    with announce_if_slow(f"reading {file.stat().st_size / 1e9:.2g} GB from {file}"):
        optimizer = torch.load(file, map_location="cpu", weights_only=True)
    return optimizer, json.loads((path / STATE).read_text("utf-8"))


def _rename(temporary: Path, path: Path) -> None:
    try:
        temporary.rename(path)
    except OSError:  # mounts of object stores rename no folders; without state.json, the checkpoint is not whole
        path.mkdir()
        for name in (WEIGHTS, OPTIMIZER, STATE):
            os.replace(temporary / name, path / name)


def _point(link: Path, target: str) -> None:
    """Make `link` a symbolic link or, where the file system has none, a text file with the name `target`."""
    temporary = link.with_name(f".{link.name}.partial")
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(target)
    except OSError:
        temporary.write_text(target + "\n", "ascii")
    if link.is_dir() and not link.is_symlink():  # a copy has resolved the link
        old = link.with_name(f".{link.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        link.rename(old)
    os.replace(temporary, link)
