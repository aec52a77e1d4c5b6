"""For gpu_check.py: throughput of loaders into GPU memory, measured in turns.

The loaders are Cropfeed's engines on every kind of shards, and the stock DALI pipeline. All make the same batches: scale jitter,
crop, flip; uint8 pixels without normalization, on the device. The stock pipeline is the one in DALI's documentation, on the
original files: fn.readers.webdataset, fn.decoders.image, fn.resize, fn.crop_mirror_normalize.
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

SHARES = (0.0, 0.5, 0.9)  # share of the images that the GPU's hardware JPEG decoder gets
STOCK = "stock DALI, original"
NextBatch = Callable[[], int]  # waits for a batch on the device; returns its number of images


def batches_of(loader: Loader) -> NextBatch:
    batches = endless(loader)
    return lambda: len(next(batches).ids)


def stock(spec: LoaderSpec) -> NextBatch:
    """The stock pipeline on a folder of shards of profile "original", with DALI's default share for the hardware decoder."""
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
        images = fn.crop_mirror_normalize(
            fn.resize(pixels, resize_shorter=short),
            crop=(size, size),
            crop_pos_x=fn.random.uniform(range=[0.0, 1.0]),
            crop_pos_y=fn.random.uniform(range=[0.0, 1.0]),
            mirror=fn.random.coin_flip(),
            dtype=types.UINT8,
            output_layout="HWC",
        )
        pipe.set_outputs(images)
    pipe.build()

    def next_batch() -> int:
        stream = torch.cuda.current_stream(device) if gpu else None
        return len(torch.from_dlpack(pipe.run(stream)[0].as_tensor()))

    return next_batch


def loaders(data: dict[str, Path], spec: LoaderSpec) -> Iterator[tuple[str, NextBatch]]:
    """The loaders with their names. data: profile -> folder of shards."""
    plain = replace(spec, dtype=torch.uint8)
    yield STOCK, stock(replace(plain, data=data["original"]))
    for profile, folder in data.items():
        for share in SHARES:
            chosen = replace(plain, data=folder, engine="dali", hw_decoder_load=share)
            yield f"dali, {profile}, hardware share {share}", batches_of(open_loader(chosen))
    whole = replace(plain, data=data["lossless"], engine="dali")
    yield "dali, lossless, whole streams", batches_of(DaliLoader(whole, cuts=False))
    for profile in ("lossless", "compact"):
        cpu = replace(plain, data=data[profile], engine="cpu")
        yield f"cpu, {profile}", batches_of(open_loader(cpu))


def measure_loaders(
    data: dict[str, Path], spec: LoaderSpec, results: Path, seconds: float, repeats: int, images: str
) -> dict[str, float]:
    """Record images/s of every loader, in turns, and its ratio to the stock pipeline. Returns the median ratios by name.

    seconds: duration of each repeat. images: their description in the rows.
    """
    device = torch.device(spec.device)
    opened = dict(loaders(data, spec))
    rates: dict[str, list[float]] = {name: [] for name in opened}
    for repeat in range(repeats + 1):  # the first is warm-up
        for name, next_batch in opened.items():
            rate = images_per_second(next_batch, seconds, device, ahead=spec.prefetch + 1)
            if repeat:
                rates[name].append(rate)
    medians = {}
    low, high = (spec.geometry.low, spec.geometry.high) if isinstance(spec.geometry, ScaleJitter) else (0, 0)
    described = f"{images}, S {low}..{high}, {spec.final_size} crop, uint8, batch {spec.batch_size}, {spec.threads} threads"
    for name, found in rates.items():
        ratios = [rate / stock_rate for rate, stock_rate in zip(found, rates[STOCK], strict=True)]
        medians[name] = sorted(ratios)[len(ratios) // 2]
        figures = Figure("images_per_s", found), Figure("ratio_to_stock_dali", ratios)
        record(results, f"feed: {name}", *figures, engine=name.split(",")[0], spec=described, cache="warm")
    return medians


def images_per_second(next_batch: NextBatch, seconds: float, device: torch.device, ahead: int) -> float:
    """Throughput over about `seconds`, with an idle device at the start and at the end. The first `ahead` batches may have been
    prefetched and do not count."""
    for _ in range(ahead):
        next_batch()
    synchronise(str(device))
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        count += next_batch()
    synchronise(str(device))
    return count / (time.perf_counter() - began)
