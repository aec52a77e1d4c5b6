"""For gpu_check.py: what each of its parts gets, and the engines that can run."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.cores import usable_cores
from pipeline.spec import LoaderSpec
from tools.bench.recording import Figure, record
from tools.profiler.measuring import Usage


@dataclass(frozen=True)
class Setting:
    """data: shards by profile. spec: of the lossless ones, in bf16. folder: for temporary files. results: file of rows. seconds:
    duration of a repeat of training; others take a quarter. images: their description in the rows."""

    data: Mapping[str, Path]
    spec: LoaderSpec
    folder: Path
    results: Path
    seconds: float
    repeats: int
    images: str
    archs: tuple[str, ...] = ("resnet50",)

    @property
    def gpu(self) -> bool:
        return self.spec.device.startswith("cuda")

    def record(
        self, benchmark: str, engine: str, figures: Mapping[str, Sequence[float]], spec: LoaderSpec | None = None, more: str = ""
    ) -> None:
        """Append and print a row for each figure with values. spec: by default the setting's. more: what else the rows say."""
        rows = [Figure(metric, values) for metric, values in figures.items() if values]
        described = describe(spec or self.spec, self.images) + (f", {more}" if more else "")
        record(self.results, benchmark, *rows, engine=engine, spec=described, cache="warm")


def describe(spec: LoaderSpec, images: str) -> str:
    """A row's spec. images: their description."""
    dtype = str(spec.dtype).removeprefix("torch.")
    crop = f"{spec.geometry} to {spec.image_size}"
    return f"{images}, {crop}, batch {spec.batch_size}, {dtype}, {spec.device}, {spec.threads} threads"


def engines() -> tuple[str, ...]:
    """The engines to measure, the first one on every machine."""
    try:
        importlib.import_module("nvidia.dali")
    except ImportError as error:
        print(f"DALI cannot be imported ({error}): its rows are left out", flush=True)
        return ("cpu",)
    return "cpu", "dali"


def use_of(usages: Sequence[Usage], images: Sequence[int]) -> dict[str, list[float]]:
    """CPU seconds for each image, and the utilization of the JPEG engine (empty if unknown), by repeat. images: their number."""
    seconds = [used.cpu_share * used.seconds * usable_cores() / count for used, count in zip(usages, images, strict=True)]
    jpeg = [used.jpeg_share for used in usages if used.jpeg_share is not None]
    return {"cpu_seconds_per_image": seconds, "jpeg_engine_share": jpeg}
