"""For gpu_check.py: throughput of loaders into GPU memory.

The loaders are Cropfeed's engines, and the stock DALI pipeline on the original files. All make the same batches: scale jitter,
crop, flip; uint8 pixels without normalization, on the device. The stock pipeline is the one in DALI's documentation:
fn.readers.webdataset, fn.decoders.image, fn.resize, fn.crop_mirror_normalize. Each other loader is measured in turns with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from pipeline import open_loader
from pipeline.cores import usable_cores
from pipeline.loader import Loader
from pipeline.plan.geometry import ScaleJitter
from pipeline.spec import LoaderSpec
from pipeline.store.shards import ShardSet
from tools.bench.gpu_setting import Setting, engines, use_of
from tools.bench.recording import ratios
from tools.profiler.loaders import endless, synchronise
from tools.profiler.measuring import Usage, in_turns, usage

THREADS = (1, 4, 8, 14, 16)  # of the CPU engine
SHARES = (0.0, 0.5, 0.9)  # share of the images that the GPU's hardware JPEG decoder gets
STOCK = "stock DALI"
NextBatch = Callable[[], int]  # waits for a batch on the device; returns its number of images


@dataclass
class Measured:
    """A loader's images/s, utilization and number of images, by repeat."""

    next_batch: NextBatch
    speeds: list[float] = field(default_factory=list)
    usages: list[Usage] = field(default_factory=list)
    images: list[int] = field(default_factory=list)

    def warm_up(self, spec: LoaderSpec) -> None:
        """Take the batches that may have been made before."""
        for _ in range(spec.prefetch + 1):
            self.next_batch()
        synchronise(spec.device)

    def measure(self, spec: LoaderSpec, seconds: float) -> None:
        """Over about `seconds`, with an idle device at the start and at the end."""
        self.warm_up(spec)
        count = 0
        with usage(spec.device) as used:
            began = time.perf_counter()
            while count == 0 or time.perf_counter() - began < seconds:
                count += self.next_batch()
            synchronise(spec.device)
        self.speeds.append(count / used.seconds)
        self.usages.append(used)
        self.images.append(count)

    def figures(self) -> dict[str, list[float]]:
        return {"images_per_s": self.speeds, **use_of(self.usages, self.images)}


def stock(spec: LoaderSpec) -> NextBatch:
    """The stock pipeline on a folder of shards of profile "original", with DALI's default share for the hardware decoder."""
    import nvidia.dali.math as dali_math
    from nvidia.dali import Pipeline, fn, types

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


def measure_one(setting: Setting, benchmark: str, loader: Loader, reference: NextBatch | None) -> None:
    """Record a loader, and its ratio to the stock pipeline, if there is one. Closes the loader."""
    batches = endless(loader)
    measured = {"loader": Measured(lambda: len(next(batches).ids))}
    if reference:
        measured[STOCK] = Measured(reference)
    for one in measured.values():
        one.warm_up(loader.spec)
    in_turns(list(measured), setting.repeats, lambda name: measured[name].measure(loader.spec, setting.seconds / 4))
    figures = measured["loader"].figures()
    if reference:
        figures["ratio_to_stock_dali"] = ratios(measured["loader"].speeds, measured[STOCK].speeds)
    setting.record(f"feed: {benchmark}", loader.engine, figures, loader.spec)
    loader.close()


def measure_threads(setting: Setting) -> Iterator[bool]:
    """Record the CPU engine by its number of threads, as far as there are cores."""
    for threads in THREADS:
        if threads <= usable_cores():
            spec = replace(setting.spec, dtype=torch.uint8, engine="cpu", threads=threads)
            measure_one(setting, f"cpu, lossless, {threads} threads", open_loader(spec), None)
            yield True


def measure_loaders(setting: Setting) -> Iterator[bool]:
    """Record the stock pipeline, and all engines on every profile, by share of the hardware decoder."""
    plain, reference = replace(setting.spec, dtype=torch.uint8), None
    with_dali = "dali" in engines()
    if with_dali:
        chosen = replace(plain, data=setting.data["original"])
        reference = stock(chosen)
        measured = Measured(reference)
        for _ in range(setting.repeats):
            measured.measure(chosen, setting.seconds / 4)
        setting.record(f"feed: {STOCK}, original", STOCK, measured.figures(), chosen)
        yield True
        for profile, folder in setting.data.items():
            for share in SHARES:
                chosen = replace(plain, data=folder, engine="dali", hw_decoder_load=share)
                measure_one(setting, f"dali, {profile}, hardware share {share}", open_loader(chosen), reference)
                yield True
    for profile in ("lossless", "compact"):
        chosen = replace(plain, data=setting.data[profile], engine="cpu")
        measure_one(setting, f"cpu, {profile}", open_loader(chosen), reference)
        yield True
    if with_dali:
        from pipeline.engines.dali import DaliLoader

        whole = DaliLoader(replace(plain, engine="dali"), cuts=False)
        measure_one(setting, "dali, lossless, whole streams", whole, reference)
        yield True
