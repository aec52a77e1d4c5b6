"""Verify every byte of a data set against its manifest, and name damaged samples."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..errors import UserError
from ..progress import BYTES, progress_bar
from ..store import files, shards
from ..store.shards import Manifest, Samples
from ..store.waiting import DaemonPool


def verify(root: str, workers: int) -> list[str]:
    """One line for each deviation from manifest.json; none if there is no damage. Raises UserError if there is no manifest."""
    manifest = Manifest(root)
    statistics = manifest.statistics
    problems = list(_check_file(files.join(root, statistics["mean_image"]), statistics["mean_image_sha256"]))
    for split, entry in manifest.splits.items():
        if "beton" in entry:
            file = entry["beton"]["file"]
            problems += _check_file(files.join(root, file), entry["beton"]["sha256"], f"verifying {file}")
        damaged = list(_check_file(files.join(root, entry["samples"]), entry["samples_sha256"]))
        problems += damaged
        samples = None if damaged else np.load(io.BytesIO(files.read(files.join(root, entry["samples"]))))
        with DaemonPool(workers) as pool:
            checks = [
                pool.submit(_check_shard, root, shard, None if samples is None else samples[samples["shard"] == number])
                for number, shard in enumerate(entry["shards"])
            ]
            total = sum(shard["bytes"] for shard in entry["shards"])
            with progress_bar(total=total, desc=f"verifying {split}", **BYTES) as bar:
                for check, shard in zip(checks, entry["shards"], strict=True):
                    problems += check.result()
                    bar.update(shard["bytes"])
    return problems


def _check_file(path: str, expected: str, label: str = "") -> Iterator[str]:
    try:
        if files.sha256(path, label) != expected:
            yield f"{path}: is damaged"
    except UserError as error:
        yield str(error)


def _check_shard(root: str, shard: dict[str, Any], samples: Samples | None) -> list[str]:
    path = files.join(root, shard["file"])
    idx = path.removesuffix(".tar") + ".idx"
    problems = list(_check_file(idx, shard["idx_sha256"]))
    try:
        tar = files.read(path)
    except UserError as error:
        return [*problems, str(error)]
    if len(tar) != shard["bytes"]:
        problems.append(f"{path}: has {len(tar)} bytes, manifest.json says {shard['bytes']}")
    elif hashlib.sha256(tar).hexdigest() == shard["sha256"]:
        return problems
    if samples is None:
        return [*problems, f"{path}: is damaged"]
    wrong = np.flatnonzero(shards.sample_checksums(np.frombuffer(tar, np.uint8), samples) != samples["crc32"])
    names = [] if problems and problems[0].startswith(idx) else _keys(idx)
    problems += [f"{path}: sample {names[i] if names else f'number {i}'} is damaged or cut off" for i in wrong]
    return problems if len(wrong) else [*problems, f"{path}: is damaged after its last sample"]


def _keys(idx: str) -> list[str]:
    lines = files.read(idx).decode().splitlines()[1:]
    return [line.split()[3].rsplit(".", 1)[0] for line in lines]
