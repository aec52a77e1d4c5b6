"""A profile: all measurements and the verdict, in the format of schema.json."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from model.make import make_model
from pipeline import choose_engine
from pipeline.cores import usable_cores
from pipeline.doctor.machine import available_memory
from pipeline.errors import UserError
from pipeline.spec import LoaderSpec
from pipeline.store.shards import ShardSet
from tools.profiler import verdict
from tools.profiler.ahead import Host, plan_ahead
from tools.profiler.apply import apply
from tools.profiler.convert import convert_sample
from tools.profiler.loaders import LoaderSpeed, PausableLoader, grid, measure_loaders
from tools.profiler.measuring import LEAST, Budget
from tools.profiler.options import ProfileOptions
from tools.profiler.planted import slow_reader
from tools.profiler.remedies import Situation
from tools.profiler.stages import Stages, measure_stages
from tools.profiler.storage import MEMORY, STREAMS, Ceiling, cached_read_ms, local_files, read_ceiling
from tools.profiler.training import Consumer, Emulated, Model, Training, measure_training
from tools.profiler.tune import BUDGET, tune
from training import tuned
from training.provenance import origin

FITS = 0.8  # share of the available memory that the page cache can hold in the long run
PREFETCHES = (1, 2, 4)
# Shares of the budget at which each part ends. The rest is for a second precision, or for a sample in another shard profile.
STORAGE_ENDS, STAGES_END, LOADERS_END, TRAINING_ENDS = 0.05, 0.2, 0.45, 0.8
SHORTEST = 0.05  # seconds of a measurement, if many fit into the budget only so


def profile(options: ProfileOptions) -> dict[str, Any]:
    """Measure, find the bottleneck and, if requested, try the remedy. Raises UserError if something cannot be measured."""
    with ExitStack() as stack:
        if options.planted and options.planted.kind == "reader":
            stack.enter_context(slow_reader(options.planted.amount))
        return Profiler(options, stack).run()


class Profiler:
    """The steps of a profile. stack: removes temporary folders."""

    def __init__(self, options: ProfileOptions, stack: ExitStack) -> None:
        self.options, self.stack = options, stack
        engine = choose_engine(options.spec)[0] if options.spec.engine == "auto" else options.spec.engine
        self.spec = replace(options.spec, engine=engine)
        shards = ShardSet(self.spec.data, self.spec.split, self.spec.cache, self.spec.cache_gb)
        self.manifest = shards.manifest
        self.images = len(shards)
        self.bytes = sum(entry["bytes"] for entry in self.manifest.splits[self.spec.split]["shards"])
        self.mean_bytes = float(shards.samples["bytes"].mean())
        self.memory = int(FITS * available_memory(Path("/")))
        self.cold, self.cold_why = self._page_cache()
        planned = self._planned(options.seconds)
        self.seconds = max(SHORTEST, options.seconds * min(1.0, LOADERS_END * options.budget / planned))
        self._start_engines()
        self.budget = Budget(options.budget)

    def _start_engines(self) -> None:
        """Import and compile what the engines need, before the time is measured."""
        for engine in {"cpu", *self._engines()}:
            loader = PausableLoader(replace(self.spec, engine=engine), cold=False)
            with suppress(UserError):  # reported where the loader is measured
                loader.resume()
            loader.close()

    def _page_cache(self) -> tuple[bool, str]:
        if self.options.cache_state != "auto":
            return self.options.cache_state == "cold", "as requested"
        if self.bytes < self.memory:
            return False, "the split fits into memory: after the first epoch, images come from the page cache"
        return True, "the split exceeds the memory: images come from the storage in every epoch"

    def run(self) -> dict[str, Any]:
        options, spec = self.options, self.spec
        print(self._duration(), file=sys.stderr)
        until = self.budget.until
        ceiling = read_ceiling(local_files(spec), options.repeats, self.seconds, until(STORAGE_ENDS))
        stages = measure_stages(spec, self._threads(), options.repeats, self.seconds / 2, until(STAGES_END))
        loaders = self._loaders()
        now = next(loader for loader in loaders if loader.spec == spec)
        if now.error:
            raise UserError(now.error)
        training = self._training()
        situation = self._situation(now, loaders, stages, training)
        limits = verdict.ceilings(situation, ceiling)
        judged = verdict.judge(situation, limits)
        found = self._head() | now.estimate.json()
        found |= {
            "stages": [self._stage(stages, name) for name in stages.measured],
            "loaders": [loader.json(self.mean_bytes) for loader in loaders],
            "storage": storage_json(ceiling, stages.cold_bytes),
            "demand": training.json() if training else None,
            "ceilings": limits,
            "verdict": judged.json(),
            "applied": None,
            "tuned": None,
            "ahead": self._ahead(situation, ceiling, stages) if options.gpus or options.hosts else None,
        }
        if options.apply:
            end = Budget(options.budget / 3).until()
            found["applied"] = apply(judged, situation, self.cold, options.repeats, self.seconds, self._consumer, end)
        if options.tune:
            found["tuned"] = self._tune()
        return found

    def _threads(self) -> list[int]:
        """Numbers of threads to try: powers of two, the number of cores, and as configured. With a cold page cache, up to twice
        the number of cores."""
        most = usable_cores() * (2 if self.cold else 1)
        powers = [1 << bits for bits in range(most.bit_length()) if 1 << bits <= most]
        return sorted({*powers, usable_cores(), self.spec.threads})

    def _planned(self, seconds: float) -> float:
        """About how long storage, stages and loaders take, if each measurement takes `seconds`."""
        turns = len(STREAMS) + (6 * len(self._threads()) + 2) / 2 + len(self._grid())  # six stages with threads, two without
        return 1.3 * turns * self.options.repeats * seconds  # with warm-up and opening

    def _duration(self) -> str:
        """A line that says how long the measurements take at most."""
        options = self.options
        most = options.budget * (1 + options.apply / 3) + BUDGET * options.tune
        turns = 4 * (bool(options.demand) + options.apply)
        planned = self._planned(self.seconds) + 1.3 * turns * options.repeats * self.seconds + BUDGET * options.tune
        return f"profiling takes about {most if options.arch else min(planned, most):.0f} seconds"

    def _grid(self) -> list[LoaderSpec]:
        """The loaders to measure."""
        return grid(self.spec, self._engines(), self._threads(), sorted({*PREFETCHES, self.spec.prefetch}))

    def _loaders(self) -> list[LoaderSpeed]:
        until = self.budget.until(LOADERS_END)
        return measure_loaders(self._grid(), self.cold, self.options.repeats, self.seconds, "loaders", until)

    def _engines(self) -> list[str]:
        """The configured engine, and the others that can run on this machine with this data."""
        beton = self.manifest.splits[self.spec.split].get("beton")
        tars_only = self.options.planted is not None and self.options.planted.kind == "reader"  # the fault slows down only tars
        here = {
            "cpu": True,
            "dali": importlib.util.find_spec("nvidia.dali") is not None if importlib.util.find_spec("nvidia") else False,
            "ffcv": bool(beton) and importlib.util.find_spec("ffcv") is not None and not tars_only,
        }
        wanted = self.options.engines or tuple(here)
        return list(dict.fromkeys([self.spec.engine, *(name for name in wanted if here[name])]))

    def _consumer(self, precision: str | None = None, demand: float | None = None) -> Consumer | None:
        """The consumer that the options describe, None if they describe none. precision, demand: replace those of the options."""
        options = self.options
        planted = options.planted
        slower = planted.amount if planted and planted.kind == "model" else 0.0
        if demand:
            return Emulated(demand, self.spec.dtype)
        if options.arch:
            return Model(options.arch, precision or options.precision, self.spec, len(self.manifest.classes), slower)
        return Emulated(options.demand, self.spec.dtype, slower) if options.demand else None

    def _training(self) -> Training | None:
        consumer = self._consumer()
        if consumer is None:
            return None
        ways = [(self.spec, consumer)]
        until = self.budget.until(TRAINING_ENDS)
        return measure_training(ways, self.cold, self.options.repeats, 2 * self.seconds, "training", until=until)[0]

    def _situation(self, now: LoaderSpeed, loaders: list[LoaderSpeed], stages: Stages, training: Training | None) -> Situation:
        situation = Situation(
            now, loaders, stages, self._used(stages), training, usable_cores(), self.mean_bytes, self.bytes,
            min(self.memory, shutil.disk_usage(MEMORY).free if Path(MEMORY).exists() else 0), cached_read_ms(self.mean_bytes),
        )  # fmt: skip
        options = self.options
        limit = verdict.limit_of(situation)
        if limit == "input" and self.manifest.profile != "compact":
            other = "lossless" if self.manifest.profile == "original" else "compact"
            folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory(prefix="cropfeed-profile-")))
            sample = convert_sample(self.spec, other, folder, options.repeats, self.seconds / 2, self.budget)
            situation = replace(situation, other=sample)
        if limit == "compute" and training and options.arch and options.precision == "no" and self._has_time_for(training):
            consumer = self._consumer("bf16")
            assert consumer
            ways, until = [(replace(self.spec, batch_size=training.spec.batch_size), consumer)], self.budget.until()
            (faster,) = measure_training(ways, self.cold, options.repeats, self.seconds, "bf16", ("alone",), until)
            situation = replace(situation, faster=("bf16", faster.demand.mean))
        return situation

    def _has_time_for(self, training: Training) -> bool:
        """Whether the steps of a second precision, which may be slower, fit into the budget."""
        step = training.spec.batch_size / training.demand.mean
        return time.perf_counter() + 2 * (1 + LEAST) * step < self.budget.until()

    def _used(self, stages: Stages) -> tuple[str, ...]:
        """The stages that run in the engine's threads."""
        on_host = ["normalize"] if self.spec.device == "cpu" else []
        own = ["cut"] if self.spec.engine == "dali" else ["decode", "resample", *on_host]
        names = ["read cold" if self.cold else "read warm", *own, "assembly"]
        return tuple(name for name in names if name in stages.measured)

    def _stage(self, stages: Stages, name: str) -> dict[str, Any]:
        measured = stages.measured[name]
        at = [
            {"threads": count, **measured.at(count).json(), "ms_per_image": measured.ms_per_image(count)}
            for count in sorted(measured.speeds)
        ]
        return {"name": name, "used": name in self._used(stages) or name == "copy", "at": at}

    def _ahead(self, situation: Situation, ceiling: Ceiling, stages: Stages) -> dict[str, Any]:
        options, spec = self.options, self.spec
        demand = options.demand
        if demand is None:
            assert situation.training  # the options have a model
            demand = situation.training.demand.mean
        decoding = next(limit for limit in verdict.ceilings(situation, ceiling) if limit["name"] == "decoding")
        pixel_bytes = 3 * spec.final_size**2
        copy = stages.measured["copy"].at(1).mean * pixel_bytes if "copy" in stages.measured else None
        host = Host(
            cores=usable_cores(),
            per_core=decoding["images_per_s"] / usable_cores(),
            stored_bytes=(stages.cold_bytes if self.bytes >= self.memory else None) or self.mean_bytes,
            data_bytes=self.bytes,
            memory=self.memory,
            storage=ceiling.bytes_per_s.mean,
            copy=copy,
            pixel_bytes=pixel_bytes,
        )
        parameters = sum(p.numel() for p in make_model(options.arch).parameters()) if options.arch else None
        return plan_ahead(host, options.gpus or 1, options.hosts or 1, demand, parameters, spec.batch_size)

    def _tune(self) -> dict[str, Any]:
        found = tune(grid(self.spec, [self.spec.engine], self._threads(), PREFETCHES), self.cold)
        file = tuned.save(self.spec, found.spec.threads, found.spec.prefetch, found.images_per_s)
        return {
            "threads": found.spec.threads,
            "prefetch": found.spec.prefetch,
            "images_per_s": found.images_per_s,
            "seconds": found.seconds,
            "file": str(file),
        }

    def _head(self) -> dict[str, Any]:
        spec = self.spec
        return {
            "format": "cropfeed-profile",
            "version": 2,
            "made": origin() | {"planted": str(self.options.planted) if self.options.planted else None},
            "data": {
                "path": self.options.name or str(spec.data),
                "split": spec.split,
                "profile": self.manifest.profile,
                "images": self.images,
                "bytes": self.bytes,
                "mean_bytes": self.mean_bytes,
                "cache": "cold" if self.cold else "warm",
                "cache_why": self.cold_why,
            },
            "spec": {
                "threads": spec.threads,
                "prefetch": spec.prefetch,
                "batch_size": spec.batch_size,
                "image_size": spec.final_size,
                "geometry": str(spec.geometry),
                "dtype": str(spec.dtype).removeprefix("torch."),
                "device": spec.device,
                "cores": usable_cores(),
            },
            "engine": spec.engine,
        }


def storage_json(ceiling: Ceiling, cold_bytes: float | None) -> dict[str, Any]:
    found = ceiling.bytes_per_s
    speeds = {"bytes_per_s": found.mean, "low": found.low, "high": found.high}
    return speeds | {"streams": ceiling.streams, "cold_bytes_per_image": cold_bytes}
