"""Finds checkpoints: the ones that RUN/checkpoints calls `last` and `best`, and the newest one that is whole.

RUN/checkpoints/step-00001200/ holds model.safetensors, optimizer.pt and state.json. `last` and `best` are symbolic links to such
folders; text files with a folder's name, where the file system has no links; or folders, if a copy has resolved the links.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open

WEIGHTS, OPTIMIZER, STATE = "model.safetensors", "optimizer.pt", "state.json"
NAME = re.compile(r"step-\d{8,}\+*")  # of a checkpoint's folder; + for a step that was saved again


def resolve(folder: Path, name: str) -> Path | None:
    """The checkpoint that RUN/checkpoints, `folder`, calls `name`: "last" or "best". None if there is none."""
    path = folder / name
    try:
        if path.is_file():
            target = path.read_bytes()[:64].decode("ascii", "replace").strip()
            path = folder / target if NAME.fullmatch(target) else path
    except OSError:
        return None
    return path if path.is_dir() else None


def problem(path: Path) -> str | None:
    """Why the checkpoint in the folder `path` is not whole; None if it is. Reads little: headers, not tensors."""
    try:
        json.loads((path / STATE).read_text("utf-8"))
        with safe_open(path / WEIGHTS, framework="pt"):
            pass
        with zipfile.ZipFile(path / OPTIMIZER):
            pass
    except (OSError, ValueError, SafetensorError, zipfile.BadZipFile) as error:
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return None


def find_last(folder: Path, report: Callable[[str], None] = lambda line: None) -> Path | None:
    """The checkpoint to continue from: `last` or, if it is missing or not whole, the newest one that is. None if there is none.

    folder: RUN/checkpoints. report: called with a line for each checkpoint that is skipped.
    """
    last = resolve(folder, "last")
    others = sorted(_entries(folder), key=lambda path: (len(path.name.rstrip("+")), path.name), reverse=True)
    for path in dict.fromkeys([*([last] if last else []), *others, *filter(None, [resolve(folder, "best")])]):
        found = problem(path)
        if found is None:
            if path != last:
                report(f"{folder / 'last'}: {'not whole' if last else 'not found'}; continuing from {path.name}")
            return path
        report(f"{path}: skipped, not a whole checkpoint ({found})")
    return None


def _entries(folder: Path) -> list[Path]:
    """The folders of checkpoints."""
    return [path for path in folder.glob("step-*") if NAME.fullmatch(path.name) and path.is_dir()]


def run_weights(run: Path, names: tuple[str, ...] = ("last",)) -> Path | None:
    """The weight file of a run: the final one, or else that of the first of the checkpoints `names` that exists, or else that of
    the newest whole checkpoint."""
    final = run / WEIGHTS
    if final.is_file():
        return final
    folder = run / "checkpoints"
    found = next((path for name in names if (path := resolve(folder, name)) and (path / WEIGHTS).is_file()), None)
    found = found or find_last(folder)
    return found / WEIGHTS if found else None
