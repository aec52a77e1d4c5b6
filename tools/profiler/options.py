"""The options of a profile: `ProfileOptions`."""

from __future__ import annotations

from dataclasses import dataclass

from model.make import check_arch
from pipeline import ENGINES
from pipeline.errors import UserError
from pipeline.spec import PRECISIONS, LoaderSpec
from tools.profiler.planted import Planted

CACHE_STATES = ("auto", "warm", "cold")


@dataclass(frozen=True)
class ProfileOptions:
    """What to profile, and how. Raises UserError for values outside their ranges.

    - spec: what to load. name: the name of the data in the report, by default its path.
    - arch, precision: the model to train; the precision by Accelerate's name.
    - demand: images per second of an emulated accelerator, instead of a model; with `gpus` or `hosts`, of each GPU.
    - cache_state: state of the page cache during measurements.
    - engines: engines to measure in addition to the spec's; empty: all that can run on this machine.
    - repeats, seconds: number and duration of each measurement.
    - budget: seconds that all measurements may take, without those of `apply` and `tune`. Slow ones have fewer repeats, but at
      least 2, and smaller batches.
    - apply: try the remedy. tune: find threads and prefetch depth for train.py.
    - gpus (per host), hosts: a cluster to plan.
    - planted: a fault to inject.
    """

    spec: LoaderSpec
    name: str = ""
    arch: str | None = None
    precision: str = "no"
    demand: float | None = None
    cache_state: str = "auto"
    engines: tuple[str, ...] = ()
    repeats: int = 5
    seconds: float = 0.5
    budget: float = 180.0
    apply: bool = False
    tune: bool = False
    gpus: int | None = None
    hosts: int | None = None
    planted: Planted | None = None

    def __post_init__(self) -> None:
        choices = [("precision", self.precision, PRECISIONS), ("cache_state", self.cache_state, CACHE_STATES)]
        choices += [("engines", engine, ENGINES) for engine in self.engines]
        for name, value, known in choices:
            if value not in known:
                raise UserError(f"`{name}`: there is no {value!r}", f"choose from {', '.join(known)}")
        if self.arch is not None:
            check_arch(self.arch)
        if self.repeats < 2:
            raise UserError(f"`repeats` must be at least 2 for a confidence interval, not {self.repeats}")
        for name in ("demand", "seconds", "budget", "gpus", "hosts"):
            number = getattr(self, name)
            if number is not None and not 0 < number < float("inf"):
                raise UserError(f"`{name}` must be above 0, not {number}")
        plans_cluster = self.gpus is not None or self.hosts is not None
        if self.arch and self.demand and not plans_cluster:
            raise UserError("`arch` measures the demand and `demand` sets it", "leave one of them out")
        if plans_cluster and not (self.arch or self.demand):
            problem = "planning with `gpus` and `hosts` needs the demand of one GPU"
            raise UserError(problem, "give `demand`, or `arch` on a machine with a GPU")
