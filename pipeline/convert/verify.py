"""Verify every byte of a data set against its manifest, and name damaged samples."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..errors import UserError
from ..progress import BYTES, progress_bar
from ..store import files
from ..store.entries import Entry, column
from ..store.manifest import Manifest
from ..store.tar import Samples, sample_checksums
from ..store.waiting import DaemonPool

_AT_ONCE = 10_000  # shards that wait for a thread


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
        problems += _check_shards(root, split, entry["shards"], samples, workers)
    return problems


def _check_shards(root: str, split: str, shards: Any, samples: Samples | None, workers: int) -> Iterator[str]:
    """shards: their entries in the manifest. samples: of the split, shard after shard."""
    sizes, ends = column(shards, "bytes").tolist(), np.concatenate([[0], np.cumsum(column(shards, "images"))])
    with DaemonPool(workers) as pool, progress_bar(total=sum(sizes), desc=f"verifying {split}", **BYTES) as bar:
        for first in range(0, len(sizes), _AT_ONCE):
            numbers = range(first, min(first + _AT_ONCE, len(sizes)))
            parts = [None if samples is None else samples[ends[number] : ends[number + 1]] for number in numbers]
            checks = [pool.submit(_check_shard, root, shards[number], part) for number, part in zip(numbers, parts, strict=True)]
            for number, check in zip(numbers, checks, strict=True):
                yield from check.result()
                bar.update(sizes[number])


def _check_file(path: str, expected: str, label: str = "") -> Iterator[str]:
    try:
        if files.sha256(path, label) != expected:
            yield f"{path}: is damaged"
    except UserError as error:
        yield str(error)


def _check_shard(root: str, shard: Entry, samples: Samples | None) -> list[str]:
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
    wrong = np.flatnonzero(sample_checksums(np.frombuffer(tar, np.uint8), samples) != samples["crc32"])
    lines = [] if problems and problems[0].startswith(idx) else files.read(idx).decode().splitlines()[1:]
    names = [line.split()[3].rsplit(".", 1)[0] for line in lines]
    problems += [f"{path}: sample {names[i] if names else f'number {i}'} is damaged or cut off" for i in wrong]
    return problems if len(wrong) else [*problems, f"{path}: is damaged after its last sample"]
