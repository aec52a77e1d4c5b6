"""The stages of the loader, each measured alone, on real images with the crops of the plan, at several numbers of threads.

read       read every page of the stored image; cold: after dropping the shards from the page cache, from new memory maps
cut        splice the tiles under the crop into a small JPEG (the input that the DALI engine gives to DALI)
decode     decode the region under the crop to pixels
resample   resize the pixels to the crop's size, and flip
normalize  PCA lighting and normalization, to the training dtype, on the CPU
assembly   the plan of a batch, its buffers and labels, in one thread
copy       copy a batch from pinned memory to the GPU, in one thread
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba import njit

from pipeline.batch import BatchPlan
from pipeline.engines.cpu import CpuLoader
from pipeline.errors import UserError
from pipeline.pixels.decoder import CorruptImageError, Decoder, cut_windows, resample_windows
from pipeline.pixels.normalize import lighting, stored_dtype, translate
from pipeline.spec import LoaderSpec
from pipeline.store.shards import ShardSet
from tools.profiler.measuring import NEVER, Estimate, in_turns
from tools.profiler.storage import drop_pages, local_files, storage_bytes

SAMPLES = 256  # images; their decoded pixels, about 60 MB, are kept for the stages after decoding
PAGE = 4096
Stage = Callable[[int], object]  # processes the sample of this number; assembly and copy process a batch


@dataclass
class Measured:
    """A stage: images per second in each repeat, by number of threads."""

    name: str
    speeds: dict[int, list[float]] = field(default_factory=dict)

    def at(self, threads: int) -> Estimate:
        """Images per second with this number of threads; if the stage was measured with one number only, with that one."""
        return Estimate.of_speeds(self.speeds[threads] if threads in self.speeds else next(iter(self.speeds.values())))

    def ms_per_image(self, threads: int) -> float:
        """Milliseconds that one thread takes for an image."""
        known = threads if threads in self.speeds else next(iter(self.speeds))
        return 1e3 * known / self.at(known).mean


@dataclass(frozen=True)
class Stages:
    """All stages by name. cold_bytes: bytes that the storage delivers per image read cold; None if unknown."""

    measured: dict[str, Measured]
    cold_bytes: float | None


class Samples:
    """Images of the data set with their planned views. Each stage is a method that processes one image, given its number.

    Images that cannot be decoded are left out. Each thread has its own buffers.
    """

    def __init__(self, spec: LoaderSpec) -> None:
        self.loader = CpuLoader(replace(spec, engine="cpu", device="cpu", rank=0, world_size=1))
        self.plans = list(islice(self._plans(), -(-SAMPLES // spec.batch_size)))
        self.places: list[tuple[BatchPlan, int]] = []
        self.stored: list[npt.NDArray[np.uint8]] = []
        self.decoded: list[tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]] = []
        decoder = Decoder()
        for plan, place in [(each, place) for each in self.plans for place in range(len(each.ids))][:SAMPLES]:
            try:
                stored = self.loader.read(int(plan.ids[place]))
                pixels, where = self._decoded(decoder, stored, plan, place)
            except CorruptImageError:
                continue
            self.places.append((plan, place))
            self.stored.append(stored)
            self.decoded.append((pixels.copy(), where.copy()))
        if not self.places:
            raise UserError(f"{spec.data}: none of the sampled images can be decoded", "make the shards again")
        self.size = self.plans[0].size
        self._local = threading.local()

    def _plans(self) -> Any:
        loader = self.loader
        return (loader.plan(batch_range) for batch_range in loader.batch_ranges(0, 0))

    def close(self) -> None:
        self.loader.close()

    def _views(self, plan: BatchPlan, place: int) -> slice:
        return slice(place * self.loader.crops, (place + 1) * self.loader.crops)

    def _decoded(self, decoder: Decoder, stored: Any, plan: BatchPlan, place: int) -> Any:
        windows, size = plan.views.windows[self._views(plan, place)], (int(plan.heights[place]), int(plan.widths[place]))
        return decoder.decode_region(stored, *size, windows, plan.size, self.loader.kernel)

    def buffers(self) -> Any:
        """This thread's own objects: decoder, resampled image, normalized image, cut JPEG, and the place of the cut."""
        own = self._local
        if not hasattr(own, "decoder"):
            shape = (self.loader.crops, *self.size, 3)
            own.decoder, own.image, own.cut = Decoder(), np.empty(shape, np.uint8), np.empty(0, np.uint8)
            own.normalized = np.empty(shape, stored_dtype(self.loader.spec.dtype))
            own.place = np.empty(4, np.int64)
        return own

    def read(self, number: int) -> object:
        plan, place = self.places[number]
        return touch(self.loader.read(int(plan.ids[place])))

    def cut(self, number: int) -> object:
        (plan, place), stored, own = self.places[number], self.stored[number], self.buffers()
        if len(own.cut) < len(stored):
            own.cut = np.empty(2 * len(stored), np.uint8)
        windows = plan.views.windows[self._views(plan, place)]
        size, (rows, columns) = (int(plan.heights[place]), int(plan.widths[place])), self.size
        return cut_windows(stored, *size, windows, rows, columns, self.loader.kernel.support, own.cut, own.place)

    def decode(self, number: int) -> object:
        return self._decoded(self.buffers().decoder, self.stored[number], *self.places[number])

    def resample(self, number: int) -> object:
        (plan, place), own = self.places[number], self.buffers()
        pixels, where = self.decoded[number]
        views, kernel = self._views(plan, place), self.loader.kernel
        return resample_windows(pixels, where, plan.views.windows[views], plan.views.flip[views], kernel, own.image)

    def normalize(self, number: int) -> object:
        (plan, place), own = self.places[number], self.buffers()
        views, images = self._views(plan, place), own.image
        if plan.views.shift is not None:
            images = translate(images, plan.views.shift[views])
        shifts = lighting(plan.views.alphas[views], self.loader.lighting_basis)
        self.loader.normalizer(self.size)(images, shifts, own.normalized)
        return own.normalized

    def assembly(self, number: int) -> object:
        """Assemble a whole batch. number: of the batch."""
        loader = self.loader
        plan = loader.plan(self.plans[number % len(self.plans)].batch_range)
        (shape,) = plan.shapes
        _, tensor = loader.buffers.acquire(shape, stored_dtype(loader.spec.dtype))
        return loader.finish([tensor.view(loader.spec.dtype)], plan)


@njit(nogil=True, cache=True)
def touch(data: Any) -> Any:
    """The sum of one byte per page, so that every page is read."""
    total = 0
    for at in range(0, len(data), PAGE):
        total += data[at]
    return total + data[-1]


def measure_stages(spec: LoaderSpec, threads: Sequence[int], repeats: int, seconds: float, until: float = NEVER) -> Stages:
    """Measure all stages with these numbers of threads. seconds: duration of each measurement. until: as in `in_turns`. Raises
    UserError if none of the sampled images can be decoded."""
    measured = measure_warm(spec, threads, repeats, seconds, until)
    gc.collect()  # the memory maps of the shards just read would keep their pages in the cache
    cold, cold_bytes = read_cold(spec, threads, repeats, seconds, until)
    return Stages({cold.name: cold} | measured, cold_bytes)


def measure_warm(
    spec: LoaderSpec, threads: Sequence[int], repeats: int, seconds: float, until: float = NEVER
) -> dict[str, Measured]:
    """All stages except cold reading."""
    samples = Samples(spec)
    stages: dict[str, Stage] = {"read warm": samples.read}
    if samples.loader.shards.manifest.profile != "original":
        stages["cut"] = samples.cut
    stages |= {"decode": samples.decode, "resample": samples.resample}
    if spec.dtype != torch.uint8:
        stages["normalize"] = samples.normalize
    measured = {name: Measured(name) for name in stages}

    def turn(way: tuple[str, int]) -> None:
        name, count = way
        measured[name].speeds.setdefault(count, []).append(speed(stages[name], len(samples.places), count, seconds))

    ways = [(name, count) for name in stages for count in threads]
    for name, count in ways:  # warm-up: compiles the kernels, and loads the images into the page cache
        speed(stages[name], len(samples.places), count, seconds / 5)
    in_turns(ways, repeats, turn, "stages", until)
    for name, alone, items in (("assembly", samples.assembly, len(samples.plans[0].ids)), *copying(spec, samples)):
        speed(alone, len(samples.plans), 1, seconds / 5)
        speeds = [items * speed(alone, len(samples.plans), 1, seconds) for _ in range(repeats)]
        measured[name] = Measured(name, {1: speeds})
    samples.close()
    return measured


def speed(stage: Stage, count: int, threads: int, seconds: float) -> float:
    """Calls per second over `threads` threads. Each thread repeats its own share of the `count` numbers until the time is over,
    and makes at least one call."""
    began = time.perf_counter()

    def run(first: int) -> int:
        done = 0
        while True:
            for number in range(first, count, threads):
                stage(number)
                done += 1
                if time.perf_counter() - began > seconds:
                    return done

    if threads == 1:
        return run(0) / (time.perf_counter() - began)
    with ThreadPoolExecutor(threads) as pool:
        calls = sum(pool.map(run, range(min(threads, count))))
        return calls / (time.perf_counter() - began)


def read_cold(
    spec: LoaderSpec, threads: Sequence[int], repeats: int, seconds: float, until: float = NEVER
) -> tuple[Measured, float | None]:
    """Read each image at most once, in random order, after dropping the page cache before each repeat. Also returns the bytes
    that the storage delivered per image."""
    measured, delivered, images = Measured("read cold"), 0, 0

    def turn(count: int) -> None:
        nonlocal delivered, images
        shards = ShardSet(spec.data, spec.split, spec.cache, spec.cache_gb)  # new memory maps: mapped pages stay in the cache
        drop_pages(local_files(spec))
        order = np.random.default_rng(0).permutation(len(shards))
        before, began = storage_bytes(), time.perf_counter()

        def run(first: int) -> int:
            done = 0
            for sample in order[first::count].tolist():
                touch(shards.read(sample))
                done += 1
                if time.perf_counter() - began > seconds:
                    break
            return done

        with ThreadPoolExecutor(count) as pool:
            done = sum(pool.map(run, range(min(count, len(order)))))
            measured.speeds.setdefault(count, []).append(done / (time.perf_counter() - began))
        if before is not None:
            delivered += (storage_bytes() or 0) - before
        images += done
        shards.close()

    in_turns(list(threads), repeats, turn, "cold reading", until)
    return measured, delivered / images if delivered else None


def copying(spec: LoaderSpec, samples: Samples) -> list[tuple[str, Stage, int]]:
    """The stage `copy`, if batches go to a GPU: the uint8 images of a batch. Its name, function and images per call."""
    if not spec.device.startswith("cuda"):
        return []
    plan = samples.plans[0]
    pinned = torch.empty((len(plan.views.flip), *plan.size, 3), dtype=torch.uint8, pin_memory=True)

    def copy(_: int) -> None:
        pinned.to(spec.device, non_blocking=True)
        torch.cuda.synchronize(spec.device)

    return [("copy", copy, len(plan.ids))]
