"""Metrics of a run, measured with a fake clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers import FakeTime
from training import metrics
from training.metrics import Clock, Meter, MetricsFile, read_metrics

CPU = torch.device("cpu")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    found = FakeTime()
    monkeypatch.setattr(metrics, "time", found)
    return found


def alone(values: torch.Tensor) -> torch.Tensor:
    """`gather` for a single process."""
    return values


def batches(fake: FakeTime, waits: list[float]) -> Iterator[int]:
    """Yield a batch after each wait."""
    for number, wait in enumerate(waits):
        fake.sleep(wait)
        yield number


def run(meter: Meter, fake: FakeTime, waits: list[float], losses: list[float], step: float) -> None:
    """Run an epoch. step: seconds of each training step."""
    for number in meter.timed(batches(fake, waits)):
        fake.sleep(step)
        meter.add(torch.tensor(losses[number]), torch.tensor(losses[number] / 8))


def test_loss_throughput_and_data_wait(fake: FakeTime) -> None:
    meter = Meter(CPU)
    run(meter, fake, [0.5, 0.0, 0.1], [3.0, 2.0, 1.0], step=0.2)
    found = meter.read(8, alone)
    assert found == {
        "train_loss": 2.0,
        "train_top1": 0.25,
        "images_per_s": pytest.approx(24 / 1.2),
        "wait_share": pytest.approx(0.5),
    }


def test_read_resets_the_meter(fake: FakeTime) -> None:
    """It also does so within an epoch. Time before the first step counts as elapsed, but not as data wait."""
    meter = Meter(CPU)
    for number in meter.timed(batches(fake, [0.5, 0.1, 0.3])):
        fake.sleep(0.5)
        meter.add(torch.tensor(float(number)), torch.tensor(number / 4))
        found = meter.read(10, alone)
        wait = (0.5, 0.1, 0.3)[number]
        assert found["train_loss"] == number
        assert found["train_top1"] == number / 4
        assert found["images_per_s"] == pytest.approx(10 / (0.5 + wait))
        assert found["wait_share"] == pytest.approx(wait / (0.5 + wait), abs=1e-6)
    fake.sleep(1.0)
    run(meter, fake, [1.0], [7.0], step=0.0)
    found = meter.read(10, alone)
    assert (found["train_loss"], found["train_top1"]) == (7, 7 / 8)
    assert found["images_per_s"] == pytest.approx(5)
    assert found["wait_share"] == pytest.approx(0.5)


def test_without_data_wait_the_share_is_zero(fake: FakeTime) -> None:
    meter = Meter(CPU)
    run(meter, fake, [0.0] * 4, [1.0] * 4, step=0.25)
    assert meter.read(8, alone)["wait_share"] == 0


def test_the_end_of_an_epoch_counts_as_data_wait(fake: FakeTime) -> None:
    """The device also waits for a loader that is slow to raise StopIteration."""

    def slow_end() -> Iterator[int]:
        yield 0
        fake.sleep(0.5)

    meter = Meter(CPU)
    for _ in meter.timed(slow_end()):
        fake.sleep(0.5)
        meter.add(torch.tensor(1.0), torch.tensor(0.5))
    assert meter.read(8, alone)["wait_share"] == pytest.approx(0.5)


def test_timed_yields_the_same_batches(fake: FakeTime) -> None:
    meter = Meter(CPU)
    assert list(meter.timed([0, "", False, 4])) == [0, "", False, 4]


def test_over_ranks_the_wait_share_is_the_maximum_and_loss_and_top1_are_means(fake: FakeTime) -> None:
    """Two ranks run one after the other. The second gathers the values that the first has sent."""
    sent: list[torch.Tensor] = []

    def send(values: torch.Tensor) -> torch.Tensor:
        sent.append(values.clone())
        return values

    def receive(values: torch.Tensor) -> torch.Tensor:
        return torch.stack([sent.pop(0), values])

    waits = ([0.3, 0.3], [0.1, 0.1])
    for first, second in (waits, waits[::-1]):
        for rank_waits, gather in ((first, send), (second, receive)):
            meter = Meter(CPU)
            loss = 10 * rank_waits[0]  # 3 and 1
            run(meter, fake, rank_waits, [loss, loss], step=0.5 - rank_waits[0])
            found = meter.read(16, gather)
        assert found == {
            "train_loss": pytest.approx(2.0),
            "train_top1": pytest.approx(0.25),
            "images_per_s": pytest.approx(32.0),
            "wait_share": pytest.approx(0.6),
        }
        assert sent == []


def test_the_clock_of_the_cpu() -> None:
    clock = Clock(CPU)
    began, first = time.perf_counter(), clock.now()
    time.sleep(0.02)
    last = clock.now()
    assert 0.02 <= clock.seconds(first, last) <= time.perf_counter() - began


def test_rows_after_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    file = MetricsFile(path, 0)
    for step in (1, 2, 3):
        file.write({"step": step, "train_loss": step / 2})
    with path.open("a") as stream:
        stream.write("4,0.1")  # truncated by a kill
    assert [row["train_loss"] for row in read_metrics(path)] == ["0.5", "1.0", "1.5"]
    MetricsFile(path, 2).write({"step": 3, "wait_share": 0.25})
    assert [(row["step"], row["train_loss"], row["wait_share"]) for row in read_metrics(path)] == [
        ("1", "0.5", ""), ("2", "1.0", ""), ("3", "", "0.25"),
    ]  # fmt: skip
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.csv"]


def busy(device: torch.device) -> Callable[[], None]:
    """A function that queues at least half a second of work on a GPU and returns immediately."""
    matrix = torch.randn(4096, 4096, device=device)
    out = torch.empty_like(matrix)

    def work(count: int) -> None:
        for _ in range(count):
            torch.mm(matrix, matrix, out=out)

    work(3)  # loads libraries
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    work(20)
    torch.cuda.synchronize(device)
    count = int(20 * 0.6 / (time.perf_counter() - began)) + 1
    return lambda: work(count)


@pytest.mark.gpu
def test_a_busy_gpu_does_not_wait() -> None:
    """The host waits 0.1 s for each batch. Only the first wait counts, because afterwards the GPU has more than 0.1 s of queued
    work."""
    device = torch.device("cuda")
    work = busy(device)
    clock = Clock(device)
    torch.cuda.synchronize()
    idle = clock.now()
    time.sleep(0.1)
    assert 0.09 < clock.seconds(idle, clock.now()) < 0.3
    work()
    requested = clock.now()
    time.sleep(0.1)
    got = clock.now()
    assert not got.query()  # the GPU is still busy
    assert clock.seconds(requested, got) < 0.05

    def slow() -> Iterator[None]:
        for _ in range(3):
            time.sleep(0.1)
            yield

    torch.cuda.synchronize()
    meter = Meter(device)
    began = time.perf_counter()
    for _ in meter.timed(slow()):
        work()
        meter.add(torch.ones((), device=device), torch.ones((), device=device))
    found = meter.read(8, alone)
    elapsed = time.perf_counter() - began
    assert elapsed > 1.2
    assert found["train_loss"] == 1
    assert 0.08 < found["wait_share"] * elapsed < 0.2  # the host waited 0.3 s
