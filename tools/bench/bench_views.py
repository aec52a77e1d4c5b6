"""The cost of several views of an image from one decode, on one core: python tools/bench/bench_views.py SHARDS

SHARDS is a folder of lossless shards. The benchmark makes the views of training images as a thread of the CPU engine does: read,
decode and resample to uint8, as for a GPU. The geometries take turns batch by batch, with the same images, and the first view is
the same in all: `RandomResizedCrop((0.3, 1.0))` alone, `MultiCrop` with two such views, and with DINO's eight small ones besides.
Each repeat is another epoch. The time is the thread's CPU time, so that a busy machine slows down all of them alike.

Two views cost less than two images by as much as their windows overlap. Their overlap is the area of the windows' intersection
divided by that of their union. Rows go to tools/bench/results/views.csv.
"""

from __future__ import annotations

import time

import _path  # noqa: F401
import numpy as np
import numpy.typing as npt
import torch

from pipeline.batch import BatchPlan
from pipeline.cli import Parser, positive, run_cli
from pipeline.engines import cpu
from pipeline.loader import Loader
from pipeline.pixels.decoder import Decoder
from pipeline.plan.geometry import MultiCrop, RandomResizedCrop
from pipeline.spec import LoaderSpec
from tools.bench.recording import RESULTS, Figure, record

AREA = (0.3, 1.0)
ONE, TWO, DINO = "one view", "2 x 224", "2 x 224 + 8 x 96"
GEOMETRIES = {
    ONE: RandomResizedCrop(AREA),
    TWO: MultiCrop(((224, 2, AREA),)),
    DINO: MultiCrop(((224, 2, AREA), (96, 8, (0.05, 0.3)))),
}
OVERLAP = 0.5
Times = npt.NDArray[np.float64]


def overlaps(plan: BatchPlan) -> Times:
    """The overlap of each image's first two views, (N,): intersection over union."""
    windows = plan.views.windows.reshape(len(plan.ids), -1, 4)[:, :2]
    shared = (windows[..., 2:].min(axis=1) - windows[..., :2].max(axis=1)).clip(min=0).prod(axis=-1)
    return np.asarray(shared / ((windows[..., 2:] - windows[..., :2]).prod(axis=-1).sum(axis=1) - shared))


def times(loader: Loader, plan: BatchPlan, decoder: Decoder) -> Times:
    """Seconds of CPU time for the views of each image of a batch, (N,)."""
    memory, _ = loader.buffers.acquire_parts(plan.shapes, np.dtype(np.uint8))
    for images in memory:
        images.fill(0)  # the kernel's work on new memory is not measured
    found = np.empty(len(plan.ids))
    for index in range(len(plan.ids)):
        start = time.thread_time()
        loader.make_or_replace(decoder, plan, index, plan.images_of(index, memory))
        found[index] = time.thread_time() - start
    return found


def measure(loaders: dict[str, Loader], epoch: int) -> tuple[dict[str, Times], Times]:
    """For an epoch, the seconds per image for each geometry, and the overlap of each image's two views."""
    decoders = {name: Decoder() for name in loaders}
    found: dict[str, list[Times]] = {name: [] for name in loaders}
    shared = []
    for batch_range in loaders[ONE].batch_ranges(epoch, 0):
        for name, loader in loaders.items():
            plan = loader.plan(batch_range)
            found[name].append(times(loader, plan, decoders[name]))
        shared.append(overlaps(plan))
    return {name: np.concatenate(parts) for name, parts in found.items()}, np.concatenate(shared)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("shards", metavar="SHARDS", help="folder of shards")
    parser.add_argument("--repeats", type=positive, default=5, help="epochs (default: %(default)s)")
    args = parser.parse_args()
    spec = LoaderSpec(args.shards, batch_size=40, dtype=torch.uint8, normalization="imagenet", threads=1)
    loaders: dict[str, Loader] = {
        name: cpu.open(LoaderSpec(**{**vars(spec), "geometry": each})) for name, each in GEOMETRIES.items()
    }
    measure(loaders, 0)
    figures: dict[str, list[float]] = {}
    for epoch in range(1, args.repeats + 1):
        found, shared = measure(loaders, epoch)
        much = shared >= OVERLAP
        values = {f"{name}, CPU ms/image": each.mean() * 1e3 for name, each in found.items()}
        values |= {f"{name} / {ONE}": found[name].sum() / found[ONE].sum() for name in (TWO, DINO)}
        values[f"{TWO} / {ONE}, overlap >= {OVERLAP}"] = found[TWO][much].sum() / found[ONE][much].sum()
        values |= {f"images with overlap >= {OVERLAP}, %": 100 * much.mean(), "mean overlap": shared.mean()}
        for metric, value in values.items():
            figures.setdefault(metric, []).append(float(value))
    count = len(loaders[ONE].shards)
    record(
        RESULTS / "views.csv",
        "views from one decode",
        *(Figure(metric, values) for metric, values in figures.items()),
        engine="cpu",
        spec=f"{count} images, {loaders[ONE].shards.manifest.profile}; area 0.3..1, small views 0.05..0.3; uint8; one core",
    )


if __name__ == "__main__":
    run_cli(main)
