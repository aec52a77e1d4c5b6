"""FFCV files beside the tars, or in their place: OUT/train.beton and OUT/val.beton, written from finished shards."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from tqdm import tqdm

from pipeline import storage
from pipeline.beton import write_beton
from pipeline.shards import ShardSet


@dataclass(frozen=True)
class BetonSettings:
    """mode: region, jpg, raw or proportion; the others as FFCV's RGBImageField has them, and ignored by region."""

    mode: str
    max_resolution: int | None
    quality: int
    proportion: float


def write_betons(out: str, settings: BetonSettings, workers: int) -> None:
    """Write a .beton of each split that has none like it yet, and name it in the manifest."""
    path = storage.join(out, "manifest.json")
    manifest: dict[str, Any] = json.loads(storage.read(path))
    for split, entry in manifest["splits"].items():
        if entry.get("beton", {}).get("settings") == asdict(settings) or not entry["shards"]:
            continue
        shards, file = ShardSet(out, split), f"{split}.beton"
        with tqdm(total=len(shards), unit=" images", desc=file) as bar, storage.publishing(storage.join(out, file)) as scratch:
            digest = write_beton(shards, scratch, workers=workers, progress=bar.update, **asdict(settings))
        entry["beton"] = {"file": file, "sha256": digest, "settings": asdict(settings)}
        storage.write(path, json.dumps(manifest, indent=1).encode())


def remove_tars(out: str) -> None:
    """Leave the FFCV files alone, with manifest, report and statistics."""
    path = storage.join(out, "manifest.json")
    manifest: dict[str, Any] = json.loads(storage.read(path))
    for entry in manifest["splits"].values():
        entry["shards"] = []  # first, so that nobody looks for tars that are going
    storage.write(path, json.dumps(manifest, indent=1).encode())
    for split in manifest["splits"]:
        folder = storage.join(out, split)
        for found in storage.listing(folder):
            if found.name.endswith((".tar", ".idx")):
                storage.remove(storage.join(folder, found.name))
