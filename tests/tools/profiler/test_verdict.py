"""The profiler's conclusions from given figures, compared with calculations by hand."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.spec import LoaderSpec
from tools.profiler.loaders import LoaderSpeed
from tools.profiler.measuring import Estimate, Usage
from tools.profiler.remedies import Converted, Remedy, Situation, compute_remedies, easiest, remedies
from tools.profiler.stages import Measured, Stages
from tools.profiler.storage import Ceiling
from tools.profiler.training import Emulated, Training, Window
from tools.profiler.verdict import Verdict, ceilings, judge, limit_of

JITTER = (0.99, 1.0, 1.01)  # each repeat's factor
SPEC = LoaderSpec("shards", engine="cpu", threads=1, prefetch=2)
DECODE_BOUND = {"read warm": 0.1, "decode": 2.0, "resample": 0.5, "normalize": 0.3, "assembly": 0.1}  # 3 ms
STORAGE_BOUND = {"read cold": 10.0, "decode": 1.0, "resample": 0.5, "normalize": 0.4, "assembly": 0.1}  # 12 ms
CEILING = Ceiling(Estimate(22e6, 21e6, 23e6), 4)


@dataclass
class CpuModel:
    """A consumer that computes on this machine's cores."""

    what: str = "resnet18, float32"
    emulated: bool = False
    dtype: torch.dtype = torch.float32

    def step(self, batch: Any) -> None:
        raise NotImplementedError


@dataclass
class Case:
    """A profile's figures. stages: ms per image and thread. speeds: images/s by (engine, threads, prefetch) of loaders, the
    configured one first.

    demand, waits: images/s of the train step alone, and data wait; without a demand there is no training. jitter: each repeat's
    factor of a loader's speed, by default JITTER.
    """

    stages: dict[str, float]
    speeds: dict[tuple[str, int, int], float]
    demand: float | None = None
    waits: float = 0.0
    consumer: Any = None
    cpu_share: float = 0.5
    jitter: dict[tuple[str, int, int], tuple[float, ...]] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)

    def situation(self) -> Situation:
        loaders = []
        for way, speed in self.speeds.items():
            spec = replace(SPEC, engine=way[0], threads=way[1], prefetch=way[2])
            repeats = [speed * factor for factor in self.jitter.get(way, JITTER)]
            loaders.append(LoaderSpeed(spec, repeats, [Usage(1.0, self.cpu_share)] * 3))
        now = loaders[0]
        loaders.sort(key=lambda loader: (loader.spec.engine, loader.spec.threads, loader.spec.prefetch))
        training = None
        if self.demand:
            reached = min(self.demand, now.estimate.mean) if self.waits else self.demand
            took = 1000 / reached
            window = Window(1000, Usage(took, 0.5), [(0.0, self.waits * took, took)], [])
            consumer = self.consumer or Emulated(self.demand, torch.float32)
            training = Training(consumer, now.spec, [self.demand * factor for factor in JITTER], [window] * 3)
        stages = Stages({name: stage(name, ms, now.spec.threads) for name, ms in self.stages.items()}, None)
        situation = Situation(
            now, loaders, stages, tuple(self.stages), training, cores=2, mean_bytes=110e3, data_bytes=5_000_000_000,
            memory=1_000_000_000, cached_read_ms=0.05,
        )  # fmt: skip
        return replace(situation, **self.more)

    def verdict(self) -> Verdict:
        situation = self.situation()
        return judge(situation, ceilings(situation, CEILING))


def stage(name: str, ms: float, threads: int) -> Measured:
    """ms: time per image and thread."""
    speeds = {count: [1e3 * count / ms * factor for factor in JITTER] for count in (1, 2, threads)}
    return Measured(name, {1: speeds[1]} if name == "assembly" else speeds)


def has(text: str, *words: str) -> None:
    for word in words:
        assert word in text, f"{word!r} is not in: {text}"


def kinds(found: list[Remedy]) -> list[str]:
    return [remedy.kind for remedy in found]


THREADS = {("cpu", 1, 2): 320.0, ("cpu", 2, 2): 640.0, ("cpu", 4, 2): 650.0}


@pytest.mark.parametrize(("demand", "gain", "after"), [(500.0, 500 / 320, "500"), (1000.0, 2.0, "640")])
def test_one_decoding_thread(demand: float, gain: float, after: str) -> None:
    """The verdict proposes the smallest number of threads that is about as good as the best one. The demand limits the gain."""
    found = Case(DECODE_BOUND, THREADS, demand, waits=1 - 320 / demand).verdict()
    assert (found.limit, found.stage) == ("input", "decode")
    assert found.chosen
    assert (found.chosen.kind, found.chosen.change) == ("threads", "--threads 2")
    assert found.chosen.spec == replace(SPEC, threads=2)
    assert found.chosen.gain == pytest.approx(gain)
    assert kinds(found.others) == ["machine"]
    assert found.json()["predicted_gain"] == found.chosen.gain
    has(found.text, f"waits for data {100 * (1 - 320 / demand):.0f} %", f") could process {demand:,.0f} images/s", "runs at 320.")
    has(
        found.text,
        "The loader alone delivers 320",
        "The slowest stage is decoding: 2.00 ms per image, 67 % of the time of all stages",
    )
    has(found.text, "with 1 thread on 2 cores", f"--threads 2. Predicted gain: {gain:.2f} ×, to {after} images/s")
    has(found.text, f"{min(2, demand / 320):.1f} times the cores, in one host or several")
    # 2.9 ms without reading, 22 MB/s
    has(found.text, "decoding 690 images/s (2.90 ms per image on one core, 2 cores)", "storage 200 images/s (22.0 MB/s, 110 kB")


def test_no_demand() -> None:
    found = Case(DECODE_BOUND, THREADS).verdict()
    assert (found.limit, found.stage) == ("input", "decode")
    assert found.chosen
    assert found.chosen.gain == pytest.approx(2.0)
    has(
        found.text,
        "Give --arch or --demand",
        "alone delivers 320 images/s",
        "Predicted gain: 2.00 ×, to 640 images/s",
    )


@pytest.mark.parametrize(("demand", "gain"), [(1000.0, 1000 / 2.05 / 80), (200.0, 200 / 80)])
def test_slow_storage(demand: float, gain: float) -> None:
    """Reading takes 10 of 12 ms, and 0.05 ms from a copy in memory."""
    memory = {"memory": 6_000_000_000}
    case = Case(STORAGE_BOUND, {("cpu", 1, 2): 80.0}, demand, waits=1 - 80 / demand, more=memory)
    found = case.verdict()
    assert (found.limit, found.stage) == ("input", "read cold")
    assert found.chosen
    assert found.chosen.kind == "cache"
    assert found.chosen.gain == pytest.approx(gain)
    assert found.chosen.spec == replace(SPEC, cache="/dev/shm/cropfeed")
    has(found.chosen.change, "--cache /dev/shm/cropfeed", "5 GB")
    has(found.text, "The slowest stage is reading from the storage: 10.0 ms per image, 83 %", f"Predicted gain: {gain:.2f} ×")
    has(found.text, "2.0 times the storage or network speed")
    cached = replace(case, more={})
    assert "cache" not in kinds(remedies(cached.situation()))  # 5 GB do not fit into 1 GB
    situation = case.situation()
    with_cache = replace(situation.now, spec=replace(SPEC, cache=Path("x")))
    assert "cache" not in kinds(remedies(replace(situation, now=with_cache, loaders=[with_cache])))


def test_other_shards() -> None:
    """Half the bytes, and a quarter of the decoding time: 5 + 0.25 + 0.5 + 0.4 + 0.1 = 6.25 ms instead of 12."""
    busier = {name.replace("cold", "warm"): 1.1 * ms for name, ms in STORAGE_BOUND.items()}  # a slower moment
    before = Stages({name: stage(name, ms, 1) for name, ms in busier.items()}, None)
    stages = Stages({name: stage(name, ms / 4 if name == "decode" else ms, 1) for name, ms in busier.items()}, None)
    other = Converted("compact", replace(SPEC, data="sample"), stages, before, 55e3)
    case = Case(STORAGE_BOUND, {("cpu", 1, 2): 80.0}, 1000.0, waits=0.92, more={"other": other})
    (remedy, machine) = remedies(case.situation())
    assert (remedy.kind, machine.kind) == ("profile", "machine")
    assert remedy.gain == pytest.approx(1000 / 6.25 / 80)
    has(remedy.change, "make_shards.py", "--profile compact")
    assert case.verdict().chosen == remedy


@pytest.mark.parametrize(("factors", "offered"), [((0.8, 1.5, 1.0), False), ((1.09, 1.1, 1.11), True)])
def test_an_insignificant_gain_is_no_remedy(factors: tuple[float, ...], offered: bool) -> None:
    """Both gain 10 % on average."""
    now, other = ("cpu", 1, 2), ("cpu", 1, 4)
    case = Case(DECODE_BOUND, {now: 300.0, other: 300.0}, 400.0, 0.25, jitter={now: (1.0, 1.0, 1.0), other: factors})
    assert ("prefetch" in kinds(remedies(case.situation()))) == offered


def test_a_small_gain_is_no_remedy() -> None:
    case = Case(DECODE_BOUND, {("cpu", 1, 2): 300.0, ("cpu", 1, 4): 312.0}, 400.0, 0.25)
    assert kinds(remedies(case.situation())) == ["machine"]


def test_predictions_keep_the_time_outside_the_stages() -> None:
    """The stages explain 3 of 5 ms per image. If they become half a millisecond faster, 4.5 ms remain."""
    situation = Case(DECODE_BOUND, {("cpu", 1, 2): 200.0}).situation()
    assert situation.total_ms == pytest.approx(3.0)
    assert situation.with_ms(2.5)[0] == pytest.approx(1000 / 4.5)


def test_an_engine_slower_than_its_stages() -> None:
    """The stages explain 2.9 of 5 ms per image."""
    stages = DECODE_BOUND | {"decode": 1.9}
    found = Case(stages, {("cpu", 1, 2): 200.0, ("dali", 1, 2): 300.0}, 400.0, 0.5).verdict()
    assert (found.limit, found.stage) == ("input", "engine")
    assert found.chosen
    assert found.chosen.change == "--engine dali"
    assert found.chosen.gain == pytest.approx(1.5)
    has(
        found.text,
        "The engine cpu itself is the bottleneck: it takes 5.00 ms",
        "account for only 2.90 ms",
        "Predicted gain: 1.50 ×, to 300 images/s",
    )
    explained = Case(stages | {"decode": 2.1}, {("cpu", 1, 2): 200.0}, 400.0, 0.5)
    assert explained.verdict().stage == "decode"


def test_failed_loaders_are_no_remedy() -> None:
    case = Case(DECODE_BOUND, {("cpu", 1, 2): 300.0, ("ffcv", 1, 2): 900.0}, 1000.0, 0.7)
    situation = case.situation()
    (failed,) = (loader for loader in situation.loaders if loader.spec.engine == "ffcv")
    assert "engine" in kinds(remedies(situation))
    failed.error = "no .beton"
    assert "engine" not in kinds(remedies(situation))


@pytest.mark.parametrize(
    ("precision", "kind", "gain", "others"), [(None, "device", 1.5, []), (180.0, "precision", 1.5, ["device"]),
                                              (130.0, "precision", 1.3, ["device"]), (104.0, "device", 1.5, [])]
)  # fmt: skip
def test_slow_model(precision: float | None, kind: str, gain: float, others: list[str]) -> None:
    """The loader delivers 1.5 times the demand, which limits the gain of another device."""
    more: dict[str, Any] = {"faster": ("bf16", precision)} if precision else {}
    found = Case(DECODE_BOUND, {("cpu", 1, 2): 150.0}, 100.0, waits=0.01, more=more).verdict()
    assert (found.limit, found.stage) == ("compute", "model")
    assert found.chosen
    assert found.chosen.kind == kind
    assert found.chosen.gain == pytest.approx(gain)
    assert kinds(found.others) == others
    has(
        found.text,
        "Compute-bound: the model is the bottleneck",
        ") could process 100 images/s",
        "150, 1.50 × as many",
        "runs at 100 images/s",
    )
    has(
        found.text, "waits for data 1.0 %", "gain more than 1.01 ×", f"Predicted gain: {gain:.2f} ×, to {100 * gain:.0f} images/s"
    )
    if kind == "precision":
        has(found.text, "--amp bf16")


def test_a_second_device_at_most_doubles_the_speed() -> None:
    (device,) = compute_remedies(Case(DECODE_BOUND, {("cpu", 1, 2): 1000.0}, 100.0).situation())
    assert device.gain == pytest.approx(2.0)


def test_training_and_loader_share_the_cores() -> None:
    """Per image, the train step takes 10 ms of both cores, and the loader 0.5 * 2 cores / 400 = 2.5 ms of one core."""
    case = Case(DECODE_BOUND, {("cpu", 1, 2): 400.0}, 100.0, 0.01, CpuModel(), more={"faster": ("bf16", 200.0)})
    situation = case.situation()
    assert situation.shares_cores
    assert situation.cpu_seconds(situation.now) == pytest.approx(2.5e-3)
    assert situation.speed_now == pytest.approx(1 / (0.010 + 0.00125))
    assert situation.training_speed(50, 0.0025) == 50
    found = compute_remedies(situation)
    assert kinds(found) == ["precision", "device"]
    assert [remedy.gain for remedy in found] == pytest.approx([0.01125 / 0.00625, 200 * 0.01125])
    has(
        case.verdict().text,
        "The model and the loader share the cores; the loader uses 12 %",
        "The train step (resnet18, float32) could process 100 images/s",
    )
    for other in (replace(case, consumer=None), replace(case, demand=None)):
        assert not other.situation().shares_cores
    assert replace(case, consumer=None).situation().speed_now == pytest.approx(100)
    assert replace(case, demand=None).situation().speed_now == pytest.approx(400)


@pytest.mark.parametrize("demand", [299.0, 251.0])
def test_balanced(demand: float) -> None:
    found = Case(DECODE_BOUND, {("cpu", 1, 2): 300.0, ("cpu", 2, 2): 600.0}, demand, 0.04).verdict()
    assert (found.limit, found.chosen) == ("balanced", None)
    assert found.json()["remedy"] == "none"
    assert found.json()["predicted_gain"] == 1
    has(
        found.text, "Balanced:", f") could process {demand:.0f} images/s", "alone delivers 300.", f"runs at {demand:.0f} images/s"
    )
    has(found.text, "waits for data 4.0 % of the time", "the bottleneck would be decoding", "Nothing needs to be changed")


@pytest.mark.parametrize(
    ("demand", "waits", "limit"),
    [(100.0, 0.05, "input"), (100.0, 0.049, "compute"), (None, 0.0, "input"), (110.0, 0.0, "balanced"), (110.0, 0.2, "input")],
)
def test_thresholds_of_the_limits(demand: float | None, waits: float, limit: str) -> None:
    assert limit_of(Case(DECODE_BOUND, {("cpu", 1, 2): 121.0}, demand, waits).situation()) == limit


def test_the_easiest_remedy_with_half_of_the_best_gain_is_chosen() -> None:
    gains = {"threads": 1.44, "prefetch": 1.5, "cache": 1.9, "profile": 1.4, "machine": 2.0}
    found = [Remedy(kind, kind, gain) for kind, gain in gains.items()]

    def chosen(remedies: list[Remedy]) -> str | None:
        one = easiest(remedies)
        return one.kind if one else None

    assert chosen(found) == "prefetch"  # 0.5 of 0.9
    assert chosen([replace(found[0], gain=1.45), *found[1:]]) == "threads"
    assert chosen(found[2:]) == "cache"
    assert chosen([replace(found[0], gain=1.1), found[4]]) == "threads"  # another machine only if nothing else helps
    assert chosen(found[4:]) == "machine"
    assert chosen([]) is None


def test_remedies_come_easiest_first() -> None:
    speeds = {("cpu", 1, 2): 80.0, ("cpu", 2, 2): 160.0, ("cpu", 1, 4): 100.0, ("dali", 1, 2): 300.0}
    found = remedies(Case(STORAGE_BOUND, speeds, 1000.0, 0.9, more={"memory": 6_000_000_000}).situation())
    assert kinds(found) == ["threads", "prefetch", "engine", "cache", "machine"]
    assert [remedy.gain for remedy in found] == pytest.approx([2.0, 1.25, 3.75, 1000 / 2.05 / 80, 2.0])


def test_ceilings() -> None:
    situation = Case(DECODE_BOUND | {"copy": 0.01}, {("cpu", 1, 2): 300.0}).situation()
    decoding, storage, copying = ceilings(situation, CEILING)
    assert decoding["images_per_s"] == pytest.approx(2 * 1000 / 2.9)
    assert storage["images_per_s"] == pytest.approx(200)
    assert copying["images_per_s"] == pytest.approx(100_000)
    has(decoding["why"], "2.90 ms", "2 cores")
    has(storage["why"], "22.0 MB/s", "110 kB")
