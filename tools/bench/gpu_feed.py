"""For gpu_check.py: feeds into GPU memory in turns, Cropfeed's engines on every kind of shards and the stock DALI pipeline.

Every way makes the same batches: scale jitter, crop, flip; plain pixels, uint8, on the device. "stock" is the pipeline of DALI's
documentation over the original files: fn.readers.webdataset, fn.decoders.image, fn.resize, fn.crop_mirror_normalize.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import nvidia.dali.math as dali_math
import torch
from nvidia.dali import Pipeline, fn, types

from pipeline import open_loader
from pipeline.engines.dali import DaliLoader
from pipeline.loader import Loader
from pipeline.plan.geometry import ScaleJitter
from pipeline.spec import LoaderSpec
from pipeline.store.shards import ShardSet
from tools.bench.recording import Figure, record
from tools.profiler.loaders import endless, synchronise

SHARES = (0.0, 0.5, 0.9)  # of the images, for the GPU's JPEG decoder in hardware
STOCK = "stock DALI, original"
Feed = Callable[[], int]  # waits for a batch on the device; its number of images


class WholeStreams(DaliLoader):
    """The DALI engine without cutting: DALI gets whole files and decodes the region its own way."""

    def __init__(self, spec: LoaderSpec) -> None:
        super().__init__(spec)
        self._cuts, self._slices = False, True


def of_loader(loader: Loader) -> Feed:
    batches = endless(loader)
    return lambda: len(next(batches).ids)


def stock(spec: LoaderSpec) -> Feed:
    """The stock pipeline over a folder of shards of profile "original", at DALI's default share for the hardware decoder."""
    assert isinstance(spec.geometry, ScaleJitter)
    device = torch.device(spec.device)
    gpu, size = device.type == "cuda", spec.final_size
    tars = [str(path) for path in ShardSet(spec.data, spec.split).shards]
    pipe = Pipeline(
        spec.batch_size, spec.threads, (device.index or 0) if gpu else None, prefetch_queue_depth=spec.prefetch, seed=1
    )
    with pipe:
        components: Any = fn.readers.webdataset(
            paths=tars,
            index_paths=[tar.removesuffix(".tar") + ".idx" for tar in tars],
            ext=["jpg", "cls"],
            random_shuffle=True,
        )
        pixels = fn.decoders.image(components[0], device="mixed" if gpu else "cpu", output_type=types.RGB)
        short = dali_math.floor(fn.random.uniform(range=[float(spec.geometry.low), float(spec.geometry.high + 1)]))
        pictures = fn.crop_mirror_normalize(
            fn.resize(pixels, resize_shorter=short),
            crop=(size, size),
            crop_pos_x=fn.random.uniform(range=[0.0, 1.0]),
            crop_pos_y=fn.random.uniform(range=[0.0, 1.0]),
            mirror=fn.random.coin_flip(),
            dtype=types.UINT8,
            output_layout="HWC",
        )
        pipe.set_outputs(pictures)
    pipe.build()

    def feed() -> int:
        stream = torch.cuda.current_stream(device) if gpu else None
        return len(torch.from_dlpack(pipe.run(stream)[0].as_tensor()))

    return feed


def ways(data: dict[str, Path], spec: LoaderSpec) -> Iterator[tuple[str, Callable[[], Feed]]]:
    """Name and what opens it. data: profile -> folder of shards."""
    plain = replace(spec, dtype=torch.uint8)
    yield STOCK, lambda: stock(replace(plain, data=data["original"]))
    for profile, folder in data.items():
        for share in SHARES:
            chosen = replace(plain, data=folder, engine="dali", hw_decoder_load=share)
            yield f"dali, {profile}, hardware share {share}", lambda chosen=chosen: of_loader(open_loader(chosen))  # type: ignore[misc]
    whole = replace(plain, data=data["lossless"], engine="dali")
    yield "dali, lossless, whole streams", lambda: of_loader(WholeStreams(whole))
    for profile in ("lossless", "compact"):
        cpu = replace(plain, data=data[profile], engine="cpu")
        yield f"cpu, {profile}", lambda cpu=cpu: of_loader(open_loader(cpu))  # type: ignore[misc]


def measure_feeds(
    data: dict[str, Path], spec: LoaderSpec, results: Path, seconds: float, repeats: int, images: str
) -> dict[str, float]:
    """Images/s of every way, in turns, and its ratio to the stock pipeline; returns the median ratios. images: what they are."""
    device = torch.device(spec.device)
    feeds = {name: opened() for name, opened in ways(data, spec)}
    rates: dict[str, list[float]] = {name: [] for name in feeds}
    for repeat in range(repeats + 1):  # the first is warm-up
        for name, feed in feeds.items():
            rate = images_per_second(feed, seconds, device, ahead=spec.prefetch + 1)
            if repeat:
                rates[name].append(rate)
    medians = {}
    low, high = (spec.geometry.low, spec.geometry.high) if isinstance(spec.geometry, ScaleJitter) else (0, 0)
    described = f"{images}, S {low}..{high}, {spec.final_size} crop, uint8, batch {spec.batch_size}, {spec.threads} threads"
    for name, found in rates.items():
        ratios = [ours / theirs for ours, theirs in zip(found, rates[STOCK], strict=True)]
        medians[name] = sorted(ratios)[len(ratios) // 2]
        for figure in (Figure("images_per_s", found), Figure("ratio_to_stock_dali", ratios)):
            record(results, f"feed: {name}", figure, engine=name.split(",")[0], spec=described, cache="warm")
    return medians


def images_per_second(feed: Feed, seconds: float, device: torch.device, ahead: int) -> float:
    """For about so long, the device's queue empty at both ends. The first `ahead` batches, which may lie ready, do not count."""
    for _ in range(ahead):
        feed()
    synchronise(str(device))
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        count += feed()
    synchronise(str(device))
    return count / (time.perf_counter() - began)
