"""FFCV files beside the tars, or in their place: OUT/train.beton and OUT/val.beton, written from finished shards."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..store import files
from ..store.shards import ShardSet
from .beton import write_beton


@dataclass(frozen=True)
class BetonSettings:
    """mode: region, jpg, raw or proportion; the others as FFCV's RGBImageField has them, and ignored by region."""

    mode: str
    max_resolution: int | None
    quality: int
    proportion: float


def write_betons(out: str, settings: BetonSettings, workers: int) -> None:
    """Write a .beton of each split that has none like it, or a damaged one, and name it in the manifest."""
    manifest_path = files.join(out, "manifest.json")
    manifest: dict[str, Any] = json.loads(files.read(manifest_path))
    for split, entry in manifest["splits"].items():
        file = f"{split}.beton"
        if entry.get("beton", {}).get("settings") == asdict(settings) and _is_intact(out, entry["beton"]):
            continue
        shards = ShardSet(out, split)
        with tqdm(total=len(shards), unit=" images", desc=file) as bar, _local(files.join(out, file)) as path:
            digest = write_beton(shards, path, workers=workers, progress=bar.update, **asdict(settings))
        entry["beton"] = {"file": file, "sha256": digest, "settings": asdict(settings)}
        files.write(manifest_path, json.dumps(manifest, indent=1).encode())


def _is_intact(out: str, beton: dict[str, Any]) -> bool:
    path = files.join(out, beton["file"])
    return files.exists(path) and files.sha256(path) == beton["sha256"]


def _local(path: str) -> AbstractContextManager[Path]:
    """Where FFCV may write `path`: there, or in a local file that is uploaded."""
    return files.publishing(path) if files.is_remote(path) else nullcontext(Path(path))


def remove_tars(out: str) -> None:
    """Leave the FFCV files alone, with manifest, report and statistics."""
    path = files.join(out, "manifest.json")
    manifest: dict[str, Any] = json.loads(files.read(path))
    for entry in manifest["splits"].values():
        entry["shards"] = []  # first, so that nobody looks for tars that are going
    files.write(path, json.dumps(manifest, indent=1).encode())
    for split in manifest["splits"]:
        folder = files.join(out, split)
        for found in files.listing(folder):
            if found.name.endswith((".tar", ".idx")):
                files.remove(files.join(folder, found.name))
