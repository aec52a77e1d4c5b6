"""Figures of a run: measured between log intervals, written to RUN/metrics.csv."""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")

COLUMNS = (
    "step", "epoch", "seconds", "lr", "train_loss", "train_top1", "images_per_s", "wait_share", "val_top1", "val_top5",
)  # fmt: skip


class Clock:
    """Moments of a device's own time. On a GPU, the host runs ahead: that it waits for a batch costs nothing while the GPU still
    computes. There a moment is an event in the current stream, which comes when all work queued before it has ended.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def now(self) -> Any:
        """This moment, opaque; does not wait for the device."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, first: Any, last: Any) -> float:
        """Between two moments. Waits for the device to come to the last."""
        if not self._cuda:
            return float(last - first)
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3


class Meter:
    """Mean loss and top-1 share, speed and waiting of the steps since it was made or last read. Adding a step does not wait for
    the device."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, device=device)  # of losses and of top-1 shares
        self._clock = Clock(device)
        self._start()

    def _start(self) -> None:
        self._sums.zero_()
        self._steps, self._began = 0, time.perf_counter()
        self._waits: list[tuple[Any, Any]] = []

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches, with the time that the device spends waiting for each."""
        iterator = iter(batches)
        while True:
            asked = self._clock.now()
            batch = next(iterator, None)
            self._waits.append((asked, self._clock.now()))
            if batch is None:
                return
            yield batch

    def add(self, loss: torch.Tensor, top1: torch.Tensor) -> None:
        """A step's mean loss and the share of its images whose highest logit was their label's: () each, on the device."""
        self._sums += torch.stack((loss, top1))
        self._steps += 1

    def read(self, batch_size: int, gather: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """train_loss, train_top1 (0..1), images_per_s and wait_share (0..1), and start anew. batch_size: global. gather: a
        tensor's values over all processes. Loss and top-1 are their means; the waiting theirs who wait longest, for all others
        then wait for these."""
        loss, top1 = (gather(self._sums).view(-1, 2).mean(0) / self._steps).tolist()
        elapsed = time.perf_counter() - self._began
        waited = sum(self._clock.seconds(*wait) for wait in self._waits)
        figures = {
            "train_loss": loss,
            "train_top1": top1,
            "images_per_s": batch_size * self._steps / elapsed,
            "wait_share": float(gather(torch.tensor(waited / elapsed, device=self._sums.device)).max()),
        }
        self._start()
        return figures


class NonFinite:
    """The first step whose loss was not finite, found without waiting for the device in each."""

    _NEVER = 1 << 62

    def __init__(self, device: torch.device) -> None:
        self._first = torch.full((), self._NEVER, dtype=torch.int64, device=device)

    def add(self, step: int, loss: torch.Tensor) -> None:
        """Note a step's loss: (), on the device."""
        self._first = torch.where(torch.isfinite(loss), self._first, self._first.clamp(max=step))

    def read(self, gather: Callable[[torch.Tensor], torch.Tensor]) -> int | None:
        """The first such step of any process, None so far. gather: a tensor's values over all processes."""
        first = int(gather(self._first).min())
        return None if first == self._NEVER else first


class MetricsFile:
    """RUN/metrics.csv: a row per log interval and per validation; cells that a row has no figure for stay empty.

    Opened at step n it first drops rows after n, which a killed run wrote beyond its last checkpoint.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        rows = [row for row in read_metrics(path) if int(row["step"]) <= step] if path.exists() else []
        temporary = path.with_name(path.name + ".partial")
        with temporary.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, path)

    def write(self, row: dict[str, float]) -> None:
        with self.path.open("a", newline="") as stream:
            csv.DictWriter(stream, COLUMNS).writerow(row)


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Rows as text; a last line that a kill cut short is left out."""
    with path.open(newline="") as stream:
        return [row for row in csv.DictReader(stream) if row["step"] and None not in row.values()]
