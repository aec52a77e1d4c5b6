"""The profiler's measurements of loaders, and of training from them."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline.batch import Batch
from pipeline.errors import UserError
from pipeline.loader import Loader
from pipeline.plan.geometry import ScaleJitter
from pipeline.spec import LoaderSpec
from tests.helpers import FakeTime, working_threads
from tools.profiler import loaders, measuring
from tools.profiler import training as trainings
from tools.profiler.loaders import LoaderSpeed, PausableLoader, grid, measure_loaders
from tools.profiler.measuring import Estimate, Usage
from tools.profiler.training import Emulated, Model, Training, fit, measure_training, run_alone, run_window
from training import metrics


def spec_for(shards: Path, **changes: Any) -> LoaderSpec:
    spec = LoaderSpec(shards, batch_size=8, image_size=32, geometry=ScaleJitter(36, 68), threads=1, engine="cpu")
    return replace(spec, **changes)


def batch_of(count: int, dtype: torch.dtype = torch.float32) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, 32, 32, generator=generator).to(dtype, memory_format=torch.channels_last)
    return Batch(images, torch.arange(count) % 3, np.arange(count))


BEFORE: set[threading.Thread] = set()


@pytest.fixture(autouse=True)
def threads_of_other_tests() -> None:
    """Loaders that other tests have left open keep their threads until they are collected."""
    BEFORE.update(working_threads())


def prefetching() -> list[str]:
    """Names of threads that prefetch batches."""
    names = ("cropfeed", "cropfeed-prefetch")
    return [thread.name for thread in working_threads() - BEFORE if thread.name in names]


@pytest.fixture
def openings(monkeypatch: pytest.MonkeyPatch) -> list[LoaderSpec]:
    """The specs that the profiler opens, in order."""
    specs: list[LoaderSpec] = []
    plain = loaders.open_loader

    def noted(spec: LoaderSpec) -> Loader:
        specs.append(spec)
        return plain(spec)

    monkeypatch.setattr(loaders, "open_loader", noted)
    return specs


# --- Loaders alone


@pytest.mark.parametrize("cold", [False, True])
def test_loaders_take_turns_and_pause_between(
    small_shards: Path, openings: list[LoaderSpec], monkeypatch: pytest.MonkeyPatch, cold: bool
) -> None:
    turns: list[int] = []
    dropped: list[list[Path]] = []
    plain_once, plain_drop = loaders.measure_once, loaders.drop_pages

    def watched(loader: PausableLoader, spec: LoaderSpec, seconds: float) -> Any:
        assert prefetching() == []
        found = plain_once(loader, spec, seconds)
        assert prefetching() == []
        turns.append(spec.threads)
        return found

    def noted(files: list[Path]) -> None:
        dropped.append(files)
        plain_drop(files)

    monkeypatch.setattr(loaders, "measure_once", watched)
    monkeypatch.setattr(loaders, "drop_pages", noted)
    specs = [spec_for(small_shards, threads=1), spec_for(small_shards, threads=2)]
    measured = measure_loaders(specs, cold, 3, 0.05, "test")
    assert sorted(turns) == [1] * 4 + [2] * 4  # one is warm-up
    assert [one.spec for one in measured] == specs
    for one in measured:
        assert one.error is None
        assert len(one.speeds) == len(one.usages) == 3
        assert 10 < min(one.speeds) <= max(one.speeds) < 1e6
        assert all(0 < used.seconds < 10 for used in one.usages)
    assert len(openings) == (8 if cold else 2)
    assert [len(files) for files in dropped] == ([4] * 8 if cold else [])


def test_images_per_second_of_a_loader(small_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each batch of 8 takes 20 ms."""
    fake = FakeTime()
    monkeypatch.setattr(loaders, "time", fake)
    monkeypatch.setattr(measuring, "time", fake)

    class Slow(PausableLoader):
        def next(self) -> Batch:
            fake.sleep(0.02)
            return super().next()

    spec = spec_for(small_shards)
    loader = Slow(spec, cold=False)
    speed, used = loaders.measure_once(loader, spec, 0.5)
    loader.close()
    assert speed == pytest.approx(400)
    assert used.seconds == pytest.approx(0.5, abs=0.021)


def test_a_failing_loader_does_not_stop_the_others(small_shards: Path) -> None:
    specs = [spec_for(small_shards, engine=engine) for engine in ("ffcv", "cpu", "nothing")]
    broken, good, unknown = measure_loaders(specs, False, 2, 0.05, "test")
    assert good.error is None
    assert len(good.speeds) == 2
    assert "ffcv" in (broken.error or "").lower()
    assert "unknown engine 'nothing'" in (unknown.error or "")
    row = unknown.json(100.0)
    assert (row["engine"], row["threads"], row["images_per_s"], row["cpu_share"]) == ("nothing", 1, None, None)
    assert row["error"] == unknown.error
    assert prefetching() == []


@pytest.mark.parametrize(("batch_size", "prefetch"), [(20, 2), (15, 4)])
def test_too_few_images_for_a_cold_cache(small_shards: Path, batch_size: int, prefetch: int) -> None:
    """The first batches use up all 60 images. Batches of 15 reach into the second epoch, where images are no longer cold."""
    (one,) = measure_loaders([spec_for(small_shards, batch_size=batch_size, prefetch=prefetch)], True, 2, 0.05, "test")
    assert "too few images to measure with a cold page cache (0 are left" in (one.error or "")
    (one,) = measure_loaders([spec_for(small_shards, batch_size=batch_size, prefetch=prefetch)], False, 2, 0.05, "test")
    assert one.error is None


def test_a_cold_measurement_reads_no_image_twice(small_shards: Path) -> None:
    spec = spec_for(small_shards)
    loader = PausableLoader(spec, cold=True)
    seen: list[int] = []
    plain = loader.next

    def noted() -> Batch:
        batch = plain()
        seen.extend(batch.ids.tolist())
        return batch

    loader.next = noted  # type: ignore[method-assign]
    loaders.measure_once(loader, spec, 60)
    loader.close()
    assert len(seen) == len(set(seen)) == 32  # of 56, after the first three batches


def test_figures_of_a_loader() -> None:
    loader = LoaderSpeed(spec_for(Path("x"), prefetch=3), [90.0, 110.0], [Usage(1, 0.4, 0.2), Usage(1, 0.6, None, 0.5)])
    other = LoaderSpeed(spec_for(Path("x")), [45.0, 50.0], [])
    ratio = Estimate.of([2.0, 2.2])
    assert loader.over(other).low == pytest.approx(ratio.low)
    row = loader.json(1000.0)
    assert (row["images_per_s"], row["bytes_per_s"], row["prefetch"]) == (100, 100_000, 3)
    assert (row["cpu_share"], row["gpu_share"], row["jpeg_share"]) == (pytest.approx(0.5), 0.2, 0.5)


def test_grid_of_specs() -> None:
    spec = LoaderSpec("x", engine="cpu", threads=2, prefetch=2)
    found = {(each.engine, each.threads, each.prefetch) for each in grid(spec, ["cpu", "dali"], [1, 2], [1, 2, 4])}
    assert found == {("cpu", t, p) for t in (1, 2) for p in (1, 2, 4)} | {("dali", 1, 2), ("dali", 2, 2)}
    assert spec in grid(spec, ["cpu", "dali"], [1, 2], [1, 2, 4])


# --- Training


class Metronome(PausableLoader):
    """Produces a batch every 20 ms, without prefetching."""

    def __init__(self, spec: LoaderSpec, fake: FakeTime) -> None:
        super().__init__(spec, cold=False)
        self.fake, self.due = fake, 0.0

    def resume(self) -> None:
        self.due = self.fake.now

    def next(self) -> Batch:
        self.due = max(self.due + 0.02, self.fake.now)
        self.fake.sleep(self.due - self.fake.now)
        return batch_of(8)

    ready, images_left = 1, 1 << 62


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    """Fake time in all modules that measure training."""
    found = FakeTime()
    for module in (trainings, measuring, metrics, loaders):
        monkeypatch.setattr(module, "time", found)
    return found


@pytest.mark.parametrize(("images_per_s", "waits", "gets"), [(800, 0.5, 400), (500, 0.2, 400), (400, 0.0, 400), (200, 0.0, 200)])
def test_data_wait(fake: FakeTime, images_per_s: float, waits: float, gets: float) -> None:
    training = Training(Emulated(images_per_s, torch.float32), spec_for(Path("x"), prefetch=4))
    window = run_window(training, Metronome(training.spec, fake), 2.0)
    assert window.wait_share == pytest.approx(waits, abs=0.01)
    assert window.images_per_s == pytest.approx(gets, rel=0.01)
    assert window.images == 8 * len(window.steps)
    assert window.usage.seconds == pytest.approx(2.0, abs=0.05)
    assert window.ready == [0.25] * len(window.steps)
    asked, got, done = window.steps[1]
    assert [got - asked, done - got] == pytest.approx([waits * 8 / gets, 8 / images_per_s])
    assert window.steps[0][0] == 0
    assert [step[2] for step in window.steps[:-1]] == [step[0] for step in window.steps[1:]]


def test_an_emulated_accelerator(fake: FakeTime) -> None:
    assert run_alone(Emulated(200, torch.float32), batch_of(8), "cpu", 1)[0] == pytest.approx(200)
    assert run_alone(Emulated(200, torch.float32), batch_of(8), "cpu", 0)[0] == pytest.approx(200)  # at least one step
    slower = Emulated(200, torch.float32, 5.0)  # 5 ms longer per image
    assert run_alone(slower, batch_of(8), "cpu", 1)[0] == pytest.approx(100)


def test_an_emulated_accelerator_in_real_time() -> None:
    assert 140 < run_alone(Emulated(200, torch.float32), batch_of(8), "cpu", 0.2)[0] <= 200


@pytest.fixture
def one_thread() -> Iterator[None]:
    """With two threads, bfloat16 gradients of some processors differ by 2 % between computations."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_step_is_sgd_with_momentum(precision: str) -> None:
    """Two steps, compared with a manual computation from the same weights."""
    torch.manual_seed(0)
    model = Model("resnet18", precision, spec_for(Path("x")), 3)
    assert model.dtype == {"no": torch.float32, "bf16": torch.bfloat16}[precision]
    module = copy.deepcopy(model.module)
    weights, velocity = list(module.parameters()), [torch.zeros_like(weight) for weight in module.parameters()]
    before = [weight.detach().clone() for weight in weights]
    batch = batch_of(8)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = F.cross_entropy(module(batch.images), batch.labels)
        gradients = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            for number, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
                velocity[number] = 0.9 * velocity[number] + gradient + 1e-4 * weight
                weight -= 1e-3 * velocity[number]
        model.step(batch._replace(images=batch.images.to(model.dtype)))
    moved = torch.cat([(new - old).flatten() for new, old in zip(model.module.parameters(), before, strict=True)])
    expected = torch.cat([(new - old).flatten() for new, old in zip(weights, before, strict=True)])
    assert expected.norm() > 0
    assert (moved - expected).norm() / expected.norm() < 0.001


def test_a_planted_slow_model(fake: FakeTime) -> None:
    model = Model("resnet18", "no", spec_for(Path("x")), 3, slower_ms=5)
    model.step(batch_of(8))
    assert fake.now == pytest.approx(0.04)


def test_consumers_and_loaders_take_turns(small_shards: Path) -> None:
    spec = spec_for(small_shards)
    ways = [(spec, Emulated(200, torch.bfloat16)), (replace(spec, threads=2), Emulated(400, torch.float32))]
    slow, fast = measure_training(ways, False, 3, 0.1, "test")
    assert (slow.spec.dtype, fast.spec.dtype, fast.spec.threads) == (torch.bfloat16, torch.float32, 2)
    for training, images_per_s in ((slow, 200), (fast, 400)):
        assert len(training.alone) == len(training.windows) == 3
        assert 0.6 * images_per_s < training.demand.mean <= images_per_s
        assert 0 <= training.wait_share < 1
        found = training.json()
        assert found["images_per_s"] == training.demand.mean
        assert found["training"]["images_per_s"] == training.speed.mean <= images_per_s
        assert 0 <= found["ready"] <= 1
        assert found["emulated"] is True
        assert [set(step) for step in found["steps"]] == [{"asked", "got", "done"}] * len(training.windows[-1].steps)
    assert prefetching() == []


def test_training_without_the_step_alone(small_shards: Path) -> None:
    way = (spec_for(small_shards), Emulated(400, torch.float32))
    for training in measure_training([way, way], False, 2, 0.05, "test", kinds=("together",)):
        assert training.alone == []
        assert len(training.windows) == 2


def test_at_least_one_step_from_a_cold_cache(small_shards: Path, openings: list[LoaderSpec]) -> None:
    spec = spec_for(small_shards, batch_size=20)
    (training,) = measure_training([(spec, Emulated(4000, torch.float32))], True, 2, 0.5, "test")
    assert [len(window.steps) for window in training.windows] == [1, 1]
    assert len(openings) == 3


def test_an_unknown_engine_is_an_error(small_shards: Path) -> None:
    with pytest.raises(UserError, match="unknown engine"):
        measure_training([(spec_for(small_shards, engine="x"), Emulated(100, torch.float32))], False, 2, 0.1, "test")
    assert prefetching() == []


@pytest.mark.parametrize(("images_per_s", "limit", "size"), [(200, 10, 64), (20, 10, 40), (1, 10, 8)])
def test_batches_shrink_where_their_steps_would_exceed_the_limit(
    images_per_s: float, limit: float, size: int, fake: FakeTime, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 5 steps. At 20 images/s, batches of 64 would take 16 s. They have at least an eighth of their images."""
    training = Training(Emulated(images_per_s, torch.float32), replace(LoaderSpec("x"), batch_size=64))
    fit(training, batch_of(64), 5, limit)
    assert training.spec.batch_size == size
    assert training.consumer.what.endswith(f", batches of {size}") == (size < 64)
    assert (f"measured with batches of {size}" in capsys.readouterr().err) == (size < 64)


def test_training_says_how_many_steps_it_measured(small_shards: Path) -> None:
    way = (spec_for(small_shards), Emulated(4000, torch.float32))
    (training,) = measure_training([way], False, 3, 0.05, "test", until=time.perf_counter())
    found = training.json()
    assert found["repeats"] == found["training"]["repeats"] == len(training.windows) == 2
    assert found["training"]["steps"] == sum(len(window.steps) for window in training.windows)
    assert found["steps_alone"] >= 2
