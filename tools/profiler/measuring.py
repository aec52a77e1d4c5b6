"""Measurements that the profiler's modules share: confidence intervals, CPU and GPU utilization, interleaved repeats."""

from __future__ import annotations

import math
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import mean, stdev
from typing import Any, TypeVar

from scipy.special import stdtrit

from pipeline.cores import usable_cores
from pipeline.profile.processes import cpu_seconds
from pipeline.progress import progress_bar

K = TypeVar("K")
CONFIDENCE = 0.95
LEAST = 2  # repeats, without which there is no interval
NEVER = math.inf  # a time limit that is not reached


@dataclass(frozen=True)
class Estimate:
    """The mean over repeats, its 95 % confidence interval [low, high] (Student's t), and the number of repeats."""

    mean: float
    low: float
    high: float
    repeats: int = LEAST

    @staticmethod
    def of(values: Sequence[float]) -> Estimate:
        """values: at least two repeats."""
        reach = float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2)) * stdev(values) / math.sqrt(len(values))
        middle = mean(values)
        return Estimate(middle, middle - reach, middle + reach, len(values))

    @staticmethod
    def of_speeds(values: Sequence[float]) -> Estimate:
        """The same for values that cannot be negative: `low` is at least 0."""
        found = Estimate.of(values)
        return replace(found, low=max(found.low, 0.0))

    def json(self) -> dict[str, float]:
        return {"images_per_s": self.mean, "low": self.low, "high": self.high, "repeats": self.repeats}


class Budget:
    """The time limit of a profile, from now on. Its parts end at shares of it, and leave to the next what they do not use."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self._began = seconds, time.perf_counter()

    def until(self, share: float = 1.0) -> float:
        """The time, by `perf_counter`, at which this share of the budget is used up."""
        return self._began + share * self.seconds


def in_turns(ways: Sequence[K], repeats: int, turn: Callable[[K], None], label: str = "", until: float = NEVER) -> None:
    """Interleaved repeats: measure every candidate once in each repeat, in a new random order, so that other load on the machine
    affects all candidates alike. turn: measures one candidate. label: of a progress bar; none without it. until: a repeat that
    would probably end after this time is left out, except for the first two."""
    order, began = random.Random(0), time.perf_counter()
    with progress_bar(total=repeats * len(ways), desc=label, unit=" measurements", disable=not label) as bar:
        for repeat in range(repeats):
            now = time.perf_counter()
            if repeat >= LEAST and now + (now - began) / repeat > until:
                return
            for way in order.sample(ways, len(ways)):
                turn(way)
                bar.update()


@dataclass
class Usage:
    """Utilization during a measurement. seconds: wall time. cpu_share: CPU time of this process and its children, as a share of
    all cores. gpu_share, jpeg_share: mean utilization of the GPU and of its JPEG engine, from NVML; None if unknown.
    """

    seconds: float = 0.0
    cpu_share: float = 0.0
    gpu_share: float | None = None
    jpeg_share: float | None = None


def shares(usages: Sequence[Usage]) -> dict[str, float | None]:
    """The mean of each share over measurements, None if unknown."""
    found: dict[str, float | None] = {}
    for name in ("cpu_share", "gpu_share", "jpeg_share"):
        known = [share for used in usages if (share := getattr(used, name)) is not None]
        found[name] = mean(known) if known else None
    return found


@contextmanager
def usage(device: str) -> Iterator[Usage]:
    """Measure the body of a `with` statement; the fields are set at its end."""
    found = Usage()
    with GpuSampler(device) as gpu:
        began, cpu = time.perf_counter(), cpu_seconds(os.getpid())
        yield found
        found.seconds = time.perf_counter() - began
        found.cpu_share = (cpu_seconds(os.getpid()) - cpu) / (found.seconds * usable_cores())
    found.gpu_share, found.jpeg_share = gpu.shares()


@dataclass
class GpuSampler:
    """Samples the utilization of a GPU and its JPEG engine ten times a second, by NVML (nvidia-ml-py); idle without NVML."""

    device: str
    gpu: list[float] = field(default_factory=list)
    jpeg: list[float] = field(default_factory=list)

    def __enter__(self) -> GpuSampler:
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        handle = nvml_handle(self.device)
        if handle is not None:
            self._thread = threading.Thread(target=self._sample, args=(handle,), daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join()

    def shares(self) -> tuple[float | None, float | None]:
        """Mean utilizations, 0..1; None if there are no samples."""
        gpu, jpeg = (mean(values) if values else None for values in (self.gpu, self.jpeg))
        return gpu, jpeg

    def _sample(self, handle: Any) -> None:
        import pynvml

        while not self._stop.wait(0.1):
            try:
                self.gpu.append(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100)
                self.jpeg.append(pynvml.nvmlDeviceGetJpgUtilization(handle)[0] / 100)
            except pynvml.NVMLError:  # GPUs before Ampere have no JPEG engine
                continue


def nvml_handle(device: str) -> Any:
    """NVML's handle of a torch device, or None without a GPU, NVML or its Python package."""
    if not device.startswith("cuda"):
        return None
    try:
        import pynvml
        import torch

        pynvml.nvmlInit()
        # By UUID: CUDA_VISIBLE_DEVICES renumbers torch's devices, not NVML's.
        uuid = torch.cuda.get_device_properties(torch.device(device)).uuid
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode())
    except (ImportError, AttributeError):
        return None
    except pynvml.NVMLError:
        return None
