"""Tuned settings: the number of threads and the prefetch depth that `tools/profile_pipeline.py --tune` found, for train.py.

They are stored in one JSON file per user, with an entry for each combination of machine, data set, engine, device and number of
cores. $CROPFEED_TUNED names the file; the default is ~/.config/cropfeed/tuned.json ($XDG_CONFIG_HOME). Entries are only hints: an
unreadable one is ignored.
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from pipeline import choose_engine
from pipeline.cores import cores_per_process
from pipeline.errors import UserError
from pipeline.spec import LoaderSpec
from pipeline.store import files
from pipeline.store.shards import Manifest


def file() -> Path:
    """The path of the file with tuned settings."""
    named = os.environ.get("CROPFEED_TUNED")
    folder = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return Path(named) if named else folder / "cropfeed" / "tuned.json"


def key(spec: LoaderSpec) -> str:
    """The key of a spec's entry: all that its best settings depend on."""
    engine = choose_engine(spec)[0] if spec.engine == "auto" else spec.engine
    device = torch.cuda.get_device_name(torch.device(spec.device)) if spec.device.startswith("cuda") else spec.device
    return f"{platform.node()}, data {Manifest(spec.data).fingerprint}, {engine}, {device}, {cores_per_process()} cores"


def load(spec: LoaderSpec) -> tuple[int, int] | None:
    """The tuned threads and prefetch depth of a spec, None if it has not been tuned on this machine."""
    entry = _read().get(key(spec), {})
    try:
        threads, prefetch = int(entry["threads"]), int(entry["prefetch"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return (threads, prefetch) if threads > 0 and prefetch > 0 else None


def save(spec: LoaderSpec, threads: int, prefetch: int, images_per_s: float) -> Path:
    """Store the best settings for a spec; returns the file's path. Raises UserError if it cannot be written."""
    path, content = file(), _read()
    content[key(spec)] = {
        "threads": threads,
        "prefetch": prefetch,
        "images_per_s": round(images_per_s, 1),
        "data": str(spec.data),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
    try:
        files.write(str(path), json.dumps(content, indent=1).encode() + b"\n")
    except (OSError, UserError) as error:
        raise UserError(f"{path}: cannot be written ({error})", "name another file in CROPFEED_TUNED") from error
    return path


def with_tuned(spec: LoaderSpec, threads: int | None, prefetch: int | None) -> LoaderSpec:
    """The spec with the given threads and prefetch depth. None stands for the tuned value or, without one, for this process's
    share of the cores, less two with a GPU, and the default depth.
    """
    found = load(spec) if threads is None or prefetch is None else None
    host = 2 if spec.device.startswith("cuda") else 0  # cores for the training thread and the rest
    best_threads, best_prefetch = found or (max(1, cores_per_process() - host), spec.prefetch)
    return replace(spec, threads=threads or best_threads, prefetch=prefetch or best_prefetch)


def _read() -> dict[str, Any]:
    try:
        content = json.loads(file().read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
