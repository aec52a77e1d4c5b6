"""Start-up time, planning time and memory by the number of samples: python tools/bench/bench_scale.py SHARDS

Makes data sets of 10^4, 1,281,167 and 10^9 samples without images, with the statistics in SHARDS' manifest. Each consists of a
manifest and a samples.npy, sparse for 10^9 samples. For each data set, a new process measures how long it takes to open a
loader, to resume at a saved position near the end of an epoch, and to plan batches at random positions of that epoch (order,
draws, windows, with made-up image sizes), and how much memory that needs beyond a small data set's loader. No image is read.

Then it measures what Python takes for an image of SHARDS, for which other threads of the process may have to wait: the CPU time
of the CPU engine, in a thread for each core, without reading and decoding. Rows go to tools/bench/results/scale.csv.
"""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import _path  # noqa: F401
import numpy as np
import torch

from pipeline.batch import Batch, BatchRange
from pipeline.cli import Parser, run_cli
from pipeline.cores import usable_cores
from pipeline.engines import cpu
from pipeline.loader import Loader
from pipeline.pixels import decoder
from pipeline.plan.sampling import Ints
from pipeline.spec import LoaderSpec
from pipeline.store import local
from pipeline.store.entries import read_large
from pipeline.store.shards import SAMPLE, Manifest
from tools.bench.recording import RESULTS, Figure, record

CASES = {  # samples, images in a shard: orders
    (10_000, 1000): ("full",),
    (1_281_167, 1000): ("full",),
    (10**9, 1000): ("full", "blocks"),
}
SPARSE = 10**8  # this many records stay zeros, without their hash: they are checked in the background, and no sample is read
REPEATS, BATCHES, BATCH = 5, 50, 256


class Planner(Loader):
    """A loader that plans batches without images."""

    engine = "none"

    def _make_batch(self, part: BatchRange) -> Batch:
        work = self.plan(part)
        return Batch(torch.empty(0), torch.empty(0), work.ids)

    def _sizes(self, ids: Ints) -> tuple[Ints, Ints]:
        return 300 + ids % 200, 400 + ids % 300


def write_data(source: Manifest, folder: Path, count: int, size: int) -> None:
    """Write a data set of `count` samples without images. size: of a shard, in samples."""
    digest = hashlib.sha256().hexdigest()
    entry = {"bytes": 1, "sha256": digest, "idx_sha256": digest}
    numbers = range(-(-count // size))
    shards = [{"file": f"train/{n:06d}.tar", "images": min(size, count - n * size), **entry} for n in numbers]
    (folder / "train").mkdir(parents=True)
    samples = folder / "train/samples.npy"
    records = np.lib.format.open_memmap(samples, "w+", SAMPLE, (count,))  # sparse
    if count < SPARSE:
        records["shard"] = np.arange(count) // size
        for name in ("bytes", "height", "width"):
            records[name] = 1
    records.flush()
    sha256 = digest if count >= SPARSE else hashlib.sha256(samples.read_bytes()).hexdigest()
    manifest = json.loads((Path(source.root) / "manifest.json").read_text())
    split = {"images": count, "samples": "train/samples.npy", "samples_sha256": sha256, "shards": shards}
    manifest["splits"] = {"train": split}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))  # as the converter writes it


def measure(source: Path, folder: Path, order: str) -> dict[str, float]:
    """Measure one data set in this process; returns the figures."""
    with tempfile.TemporaryDirectory() as name:  # compiles, without the memory that the data set takes
        write_data(Manifest(source), Path(name), BATCH, 2)
        next(iter(Planner(LoaderSpec(name, batch_size=BATCH, normalization="channel", order=order))))
        with (Path(name) / "manifest.json").open("rb") as stream:
            read_large(stream)
    spec = LoaderSpec(folder, batch_size=BATCH, normalization="channel", order=order)
    before = peak_memory()
    began = time.perf_counter()
    loader = Planner(spec)
    opened = time.perf_counter() - began
    began = time.perf_counter()
    loader.load_state_dict(loader.state_dict() | {"epoch": 77, "consumed": loader.total - BATCH})
    next(iter(loader))
    resumed = time.perf_counter() - began
    positions = random.Random(0)
    began = time.perf_counter()
    for _ in range(BATCHES):
        loader.seek(77, positions.randrange(loader.total // BATCH) * BATCH)
        next(iter(loader))
    planned = (time.perf_counter() - began) / (BATCHES * BATCH)
    grown = peak_memory() - before
    times = {"open_ms": opened * 1e3, "resume_ms": resumed * 1e3, "plan_us_per_image": planned * 1e6}
    return times | {"memory_grown_mb": grown / 1e6}


def measure_python(shards: Path) -> list[float]:
    """CPU time of the CPU engine without reading and decoding, us per image, for each of some epochs."""
    decode = patch.object(decoder, "decode_views", lambda *arguments: arguments[7].fill(False))
    read = patch.object(local, "read_descriptors", lambda *arguments: arguments[-1].fill(True))
    spec = LoaderSpec(shards, batch_size=BATCH, dtype=torch.uint8, threads=usable_cores(), device="cpu")
    with cpu.open(spec) as loader:
        list(loader)  # opens the shards
        with decode, read:
            list(loader)  # batches from before
            times = []
            for _ in range(4 * REPEATS):
                began = time.process_time()
                images = sum(len(batch.ids) for batch in loader)
                times.append((time.process_time() - began) / images * 1e6)
    return times


def peak_memory() -> int:
    """Of this process, bytes. What getrusage says begins with the memory of the process that started this one."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="any folder of shards")
    parser.add_argument("--results", type=Path, default=RESULTS / "scale.csv")
    parser.add_argument("--measure", nargs=2, metavar=("DATA", "ORDER"), help="measure DATA in this process, and print JSON")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.shards, Path(args.measure[0]), args.measure[1])))
        return
    source = Manifest(args.shards)
    for (count, size), orders in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "data"
            write_data(source, data, count, size)
            for order in orders:
                command = [sys.executable, __file__, str(args.shards), "--measure", str(data), order]
                runs = [
                    json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(REPEATS)
                ]
                figures = [Figure(metric, [run[metric] for run in runs]) for metric in runs[0]]
                spec = f"{count} samples in {-(-count // size)} shards, order {order}, batch {BATCH}"
                record(args.results, "scale", *figures, engine="any", spec=spec, cache="warm")
    spec = f"uint8, {usable_cores()} threads, batch {BATCH}, without reading and decoding"
    record(args.results, "scale", Figure("python_us_per_image", measure_python(args.shards)), engine="cpu", spec=spec)


if __name__ == "__main__":
    run_cli(main)
