"""Images/s of a data set that is not in the page cache, over those of one that is: python tools/bench/bench_cold.py SHARDS

Makes a data set of at least 6,400 images, copies of SHARDS' training images, in --folder, which has to be on the disk to
measure. The CPU engine loads an epoch in turns: from the page cache; after dropping the data set from it; and so without reading
ahead. Rows go to tools/bench/results/cold.csv, with the disk's speed of sequential reads of 4 MiB.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _path  # noqa: F401
import numpy as np

from pipeline import open_loader
from pipeline.cli import Parser, run_cli
from pipeline.cores import usable_cores
from pipeline.loader import Loader
from pipeline.spec import ORDERS, LoaderSpec
from pipeline.store.shards import ShardSet
from tools.bench.recording import RESULTS, Figure, ratios, record
from tools.profiler.storage import drop_pages

IMAGES, REPEATS, BATCH = 6400, 5, 256


def write_data(source: ShardSet, folder: Path) -> int:
    """Write a data set that has each shard with training images several times; returns the number of its images."""
    (folder / "train").mkdir(parents=True)
    manifest = json.loads((Path(source.manifest.root) / "manifest.json").read_text())
    copies = -(-IMAGES // len(source))
    samples = np.tile(source.samples, copies)
    samples["shard"] += np.arange(copies).repeat(len(source)).astype(samples["shard"].dtype) * len(source.shards)
    entries = [
        entry | {"file": f"train/{copy * len(source.shards) + number:06d}.tar"}
        for copy in range(copies)
        for number, entry in enumerate(manifest["splits"]["train"]["shards"])
    ]
    for entry, tar in zip(entries, [*source.shards] * copies, strict=True):
        shutil.copy(tar, folder / entry["file"])
    np.save(folder / "train/samples.npy", samples)
    digest = hashlib.sha256((folder / "train/samples.npy").read_bytes()).hexdigest()
    split = {"images": len(samples), "samples": "train/samples.npy", "samples_sha256": digest, "shards": entries}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"splits": {"train": split}}))
    return len(samples)


def images_per_second(loader: Loader) -> float:
    """Of one epoch, from the first request on."""
    began = time.perf_counter()
    return sum(len(batch.ids) for batch in loader) / (time.perf_counter() - began)


def megabytes_per_second(tars: list[Path]) -> float:
    drop_pages(tars)
    began, count = time.perf_counter(), 0
    for tar in tars:
        with tar.open("rb", buffering=0) as stream:
            while block := stream.read(4 << 20):
                count += len(block)
    return count / 1e6 / (time.perf_counter() - began)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    tars = sorted((folder / "train").glob("*.tar"))
    found: dict[str, list[float]] = {name: [] for name in ("warm", "cold", "cold without reading ahead", "disk")}
    spec = LoaderSpec(folder, batch_size=BATCH, normalization="channel", engine="cpu", threads=usable_cores(), order=args.order)
    with open_loader(spec) as loader:
        images_per_second(loader)  # compiles
        ahead: Callable[..., Any] = loader.shards.read_ahead
        for _ in range(REPEATS):
            found["disk"].append(megabytes_per_second(tars))
            for name in ("warm", "cold", "cold without reading ahead"):
                loader.close()  # nothing in progress
                if name != "warm":
                    drop_pages(tars)
                loader.shards.read_ahead = (lambda *_: None) if "without" in name else ahead  # type: ignore[method-assign,assignment]
                found[name].append(images_per_second(loader))
    return found


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="any folder of shards with training images")
    parser.add_argument("--folder", type=Path, help="where the data set is written, and removed afterwards; default: $TMPDIR")
    parser.add_argument("--order", choices=ORDERS, default="full")
    parser.add_argument("--results", type=Path, default=RESULTS / "cold.csv")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        images = write_data(ShardSet(args.shards, "train"), Path(name) / "data")
        found = measure(args, Path(name) / "data")
    spec = f"{images} images, order {args.order}, batch {BATCH}, {usable_cores()} threads"
    for name, values in found.items():
        figures = [Figure("mb_per_s" if name == "disk" else "images_per_s", values)]
        if "cold" in name:
            figures.append(Figure("over_warm", ratios(values, found["warm"])))
        record(args.results, name, *figures, engine="cpu", spec=spec, cache=name.split()[0])


if __name__ == "__main__":
    run_cli(main)
