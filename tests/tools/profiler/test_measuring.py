"""The profiler's measuring tools: intervals, turns, and the utilisation of processor and GPU."""

from __future__ import annotations

import math
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

from tools.profiler.measuring import Estimate, GpuSampler, cores, cpu_seconds, in_turns, usage

# --- Intervals and turns


@pytest.mark.parametrize(("values", "t_table"), [([1, 2, 3, 4, 5], 2.776), ([3, 5], 12.706), ([7.5] * 3, 4.303)])
def test_the_interval_is_students(values: list[float], t_table: float) -> None:
    """t_table: 97.5 %, from a printed table."""
    found = Estimate.of(values)
    middle = sum(values) / len(values)
    spread = math.sqrt(sum((value - middle) ** 2 for value in values) / (len(values) - 1))
    reach = t_table * spread / math.sqrt(len(values))
    assert (found.mean, found.low, found.high) == pytest.approx((middle, middle - reach, middle + reach), rel=1e-3)


def test_the_interval_is_scipys() -> None:
    values = [812.0, 790.5, 833.1, 805.9, 801.2, 799.9, 826.0]
    found = Estimate.of(values)
    low, high = scipy.stats.t.interval(0.95, len(values) - 1, scipy.stats.tmean(values), scipy.stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-12)
    assert Estimate.of_speeds(values) == found
    assert found.json() == {"images_per_s": found.mean, "low": found.low, "high": found.high}


def test_no_speed_is_negative() -> None:
    assert Estimate.of([1.0, 5.0]).low < 0
    assert Estimate.of_speeds([1.0, 5.0]).low == 0
    assert Estimate.of_speeds([1.0, 5.0]).mean == 3


def test_every_way_has_its_turn_in_every_repeat() -> None:
    taken: list[str] = []
    in_turns("abcd", 6, taken.append)
    repeats = ["".join(taken[at : at + 4]) for at in range(0, len(taken), 4)]
    assert len(repeats) == 6
    assert all(sorted(repeat) == list("abcd") for repeat in repeats)
    assert len(set(repeats)) > 1  # drawn anew


# --- The processor's and the GPU's time


def burn(seconds: float) -> None:
    """CPU time of this thread, however long that takes."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def test_cpu_time_of_threads_counts() -> None:
    before = cpu_seconds()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(burn, [0.15, 0.15]))
    assert cpu_seconds() - before == pytest.approx(0.3, abs=0.1)


def test_cpu_time_of_children_counts_while_they_live_and_after() -> None:
    code = "import time\nwhile time.process_time() < 0.3: pass\nprint(time.process_time(), flush=True); input()"
    before = cpu_seconds()
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout
    burnt = float(child.stdout.readline())
    alive = cpu_seconds() - before
    child.communicate("\n")
    after = cpu_seconds() - before
    assert alive == pytest.approx(burnt, abs=0.1)
    assert alive - 0.03 <= after <= alive + 0.1  # not lost, not counted twice; the kernel counts ticks


def test_the_share_of_the_cores() -> None:
    with usage("cpu") as taken:
        began, cpu = time.perf_counter(), time.process_time()
        burn(0.3)
        time.sleep(0.1)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - began
    assert taken.seconds == pytest.approx(wall, abs=0.05)
    assert taken.cpu_share * cores() * taken.seconds == pytest.approx(cpu, abs=0.05)
    assert 0 < taken.cpu_share < 1.05 / cores()  # of one busy thread
    assert taken.gpu_share is taken.jpeg_share is None


class NVMLError(Exception):
    pass


class FakeNvml(SimpleNamespace):
    """NVML as far as it is asked: 20 and 40 per cent in turn, of GPU "GPU-one" alone."""

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
        return [80, 1000]  # and the sampling period


def sampled(monkeypatch: pytest.MonkeyPatch, fake: FakeNvml, uuid: str = "one") -> tuple[float | None, float | None]:
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuid))
    with GpuSampler("cuda:0") as sampler:
        if fake.works and uuid == "one":
            assert fake.enough.wait(10)
    return sampler.shares()


def test_the_gpus_utilisation(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeNvml(jpeg=True)
    gpu, jpeg = sampled(monkeypatch, fake)
    expected = (40 * -(-fake.asked // 2) + 20 * (fake.asked // 2)) / fake.asked / 100
    assert gpu == pytest.approx(expected)
    assert jpeg == pytest.approx(0.8)


def test_a_gpu_without_a_jpeg_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, jpeg = sampled(monkeypatch, FakeNvml(jpeg=False))
    assert gpu == pytest.approx(0.3, abs=0.05)
    assert jpeg is None


def test_without_nvml_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sampled(monkeypatch, FakeNvml(jpeg=True, works=False)) == (None, None)
    assert sampled(monkeypatch, FakeNvml(jpeg=True), uuid="another") == (None, None)
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    with GpuSampler("cuda:0") as sampler:
        time.sleep(0.15)
    assert sampler.shares() == (None, None)
