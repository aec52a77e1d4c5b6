"""The profiler's measurements: confidence intervals, turns, and CPU and GPU utilization."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import scipy.stats
import torch

from pipeline import progress
from pipeline.cores import usable_cores
from tests.helpers import FakeTime
from tools.profiler.measuring import Estimate, GpuSampler, cpu_seconds, in_turns, usage

# --- Intervals and turns


@pytest.mark.parametrize(("values", "t_table"), [([1, 2, 3, 4, 5], 2.776), ([3, 5], 12.706), ([7.5] * 3, 4.303)])
def test_the_interval_is_from_students_t(values: list[float], t_table: float) -> None:
    """t_table: the 97.5 % quantile from a printed table."""
    found = Estimate.of(values)
    middle = sum(values) / len(values)
    spread = math.sqrt(sum((value - middle) ** 2 for value in values) / (len(values) - 1))
    reach = t_table * spread / math.sqrt(len(values))
    assert (found.mean, found.low, found.high) == pytest.approx((middle, middle - reach, middle + reach), rel=1e-3)


def test_the_interval_equals_scipys() -> None:
    values = [812.0, 790.5, 833.1, 805.9, 801.2, 799.9, 826.0]
    found = Estimate.of(values)
    low, high = scipy.stats.t.interval(0.95, len(values) - 1, scipy.stats.tmean(values), scipy.stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-12)
    assert Estimate.of_speeds(values) == found
    assert found.json() == {"images_per_s": found.mean, "low": found.low, "high": found.high, "repeats": 7}


def test_no_speed_is_negative() -> None:
    assert Estimate.of([1.0, 5.0]).low < 0
    assert Estimate.of_speeds([1.0, 5.0]).low == 0
    assert Estimate.of_speeds([1.0, 5.0]).mean == 3


def test_in_turns_covers_every_way_in_every_repeat() -> None:
    taken: list[str] = []
    in_turns("abcd", 6, taken.append)
    repeats = ["".join(taken[at : at + 4]) for at in range(0, len(taken), 4)]
    assert len(repeats) == 6
    assert all(sorted(repeat) == list("abcd") for repeat in repeats)
    assert len(set(repeats)) > 1  # the order varies


@pytest.mark.parametrize(("seconds", "repeats"), [(0.0, 2), (3.5, 3), (4.5, 4), (100, 6)])
def test_in_turns_ends_before_the_time_limit_but_repeats_at_least_twice(
    seconds: float, repeats: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeTime()
    monkeypatch.setattr("tools.profiler.measuring.time", fake)
    taken: list[str] = []

    def turn(way: str) -> None:
        taken.append(way)
        fake.sleep(0.5)

    in_turns("ab", 6, turn, until=seconds)
    assert len(taken) == 2 * repeats


def test_in_turns_shows_its_progress_if_it_has_a_label(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "DELAY_S", 0.1)
    monkeypatch.setattr(progress, "LOG_S", 0.01)
    in_turns("ab", 2, lambda _: time.sleep(0.1))
    assert capsys.readouterr().err == ""
    in_turns("ab", 2, lambda _: time.sleep(0.1), "stages")
    assert "stages: 100%" in capsys.readouterr().err


# --- CPU and GPU utilization


def burn(seconds: float) -> None:
    """Use CPU time in this thread."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def test_cpu_time_includes_threads() -> None:
    before = cpu_seconds(os.getpid())
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(burn, [0.15, 0.15]))
    assert cpu_seconds(os.getpid()) - before == pytest.approx(0.3, abs=0.1)


def test_cpu_time_includes_running_and_finished_children() -> None:
    code = "import time\nwhile time.process_time() < 0.3: pass\nprint(time.process_time(), flush=True); input()"
    before = cpu_seconds(os.getpid())
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout
    burnt = float(child.stdout.readline())
    alive = cpu_seconds(os.getpid()) - before
    child.communicate("\n")
    after = cpu_seconds(os.getpid()) - before
    assert alive == pytest.approx(burnt, abs=0.1)
    assert alive - 0.03 <= after <= alive + 0.1  # not lost, and not counted twice; the kernel counts in ticks


def test_cpu_share() -> None:
    with usage("cpu") as used:
        began, cpu = time.perf_counter(), time.process_time()
        burn(0.3)
        time.sleep(0.1)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - began
    assert used.seconds == pytest.approx(wall, abs=0.05)
    assert used.cpu_share * usable_cores() * used.seconds == pytest.approx(cpu, abs=0.05)
    assert 0 < used.cpu_share < 1.05 / usable_cores()  # one busy thread
    assert used.gpu_share is used.jpeg_share is None


class NVMLError(Exception):
    pass


class FakeNvml(SimpleNamespace):
    """The functions of NVML that the profiler calls: GPU "GPU-one", with alternating utilizations of 20 and 40 percent."""

    NVMLError = NVMLError

    def __init__(self, jpeg: bool, works: bool = True) -> None:
        super().__init__()
        self.has_jpeg, self.works, self.asked = jpeg, works, 0
        self.enough = threading.Event()

    def nvmlInit(self) -> None:  # noqa: N802
        if not self.works:
            raise NVMLError("driver not loaded")

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes) -> str:  # noqa: N802
        if uuid != b"GPU-one":
            raise NVMLError("not found")
        return "handle"

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:  # noqa: N802
        assert handle == "handle"
        self.asked += 1
        if self.asked == 4:
            self.enough.set()
        return SimpleNamespace(gpu=40 if self.asked % 2 else 20, memory=99)

    def nvmlDeviceGetJpgUtilization(self, handle: str) -> list[int]:  # noqa: N802
        assert handle == "handle"
        if not self.has_jpeg:
            raise NVMLError("not supported")
        return [80, 1000]  # the second is the sampling period


def sampled(monkeypatch: pytest.MonkeyPatch, fake: FakeNvml, uuid: str = "one") -> tuple[float | None, float | None]:
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuid))
    with GpuSampler("cuda:0") as sampler:
        if fake.works and uuid == "one":
            assert fake.enough.wait(10)
    return sampler.shares()


def test_gpu_utilization(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeNvml(jpeg=True)
    gpu, jpeg = sampled(monkeypatch, fake)
    expected = (40 * -(-fake.asked // 2) + 20 * (fake.asked // 2)) / fake.asked / 100
    assert gpu == pytest.approx(expected)
    assert jpeg == pytest.approx(0.8)


def test_a_gpu_without_a_jpeg_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, jpeg = sampled(monkeypatch, FakeNvml(jpeg=False))
    assert gpu == pytest.approx(0.3, abs=0.05)
    assert jpeg is None


def test_shares_are_none_without_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sampled(monkeypatch, FakeNvml(jpeg=True, works=False)) == (None, None)
    assert sampled(monkeypatch, FakeNvml(jpeg=True), uuid="another") == (None, None)
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    with GpuSampler("cuda:0") as sampler:
        time.sleep(0.15)
    assert sampler.shares() == (None, None)
