"""The metrics of a run, measured over each log interval and written to RUN/metrics.csv."""

from __future__ import annotations

import csv
import errno
import io
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

from pipeline.errors import writing
from pipeline.store import files

T = TypeVar("T")

COLUMNS = (
    "step", "epoch", "seconds", "lr", "train_loss", "train_top1", "images_per_s", "wait_share", "val_top1", "val_top5",
)  # fmt: skip


class Clock:
    """Timestamps on the timeline of a device.

    The host runs ahead of a GPU. If the host waits for a batch while the GPU is still busy, the wait costs no time. On a GPU, a
    timestamp is therefore a CUDA event in the current stream, which is reached once all earlier work has finished.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def now(self) -> Any:
        """A timestamp (opaque). Does not synchronize with the device."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, first: Any, last: Any) -> float:
        """The seconds between two timestamps. Waits for the device to reach the last one."""
        if not self._cuda:
            return float(last - first)
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3


class Meter:
    """Mean loss, top-1 accuracy, throughput and data wait of the steps since construction or since the last `read`. Adding a step
    does not synchronize with the device."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, device=device)  # of losses and of top-1 accuracies
        self._clock = Clock(device)
        self._start()

    def _start(self) -> None:
        self._sums.zero_()
        self._steps, self._began = 0, time.perf_counter()
        self._waits: list[tuple[Any, Any]] = []

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the same batches, and time how long the device waits for each."""
        iterator = iter(batches)
        while True:
            requested = self._clock.now()
            batch = next(iterator, None)
            self._waits.append((requested, self._clock.now()))
            if batch is None:
                return
            yield batch

    def add(self, loss: torch.Tensor, top1: torch.Tensor) -> None:
        """Add a step's mean loss and top-1 accuracy (0..1), scalar tensors on the device."""
        self._sums += torch.stack((loss, top1))
        self._steps += 1

    def read(self, batch_size: int, gather: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """Return train_loss, train_top1 (0..1), images_per_s and wait_share (0..1), and reset. Loss and top-1 are means over
        ranks. The wait share is the maximum over ranks, because all ranks wait for the slowest one.

        batch_size: global. gather: concatenates a tensor of all ranks."""
        loss, top1 = (gather(self._sums).view(-1, 2).mean(0) / self._steps).tolist()
        elapsed = time.perf_counter() - self._began
        waited = sum(self._clock.seconds(*wait) for wait in self._waits)
        values = {
            "train_loss": loss,
            "train_top1": top1,
            "images_per_s": batch_size * self._steps / elapsed,
            "wait_share": float(gather(torch.tensor(waited / elapsed, device=self._sums.device)).max()),
        }
        self._start()
        return values


class NonFiniteLoss:
    """Detects the first step with a loss that is not finite, without synchronizing with the device in each step."""

    _NEVER = 1 << 62

    def __init__(self, device: torch.device) -> None:
        self._first = torch.full((), self._NEVER, dtype=torch.int64, device=device)

    def add(self, step: int, loss: torch.Tensor) -> None:
        """Add a step's loss, a scalar tensor on the device."""
        self._first = torch.where(torch.isfinite(loss), self._first, self._first.clamp(max=step))

    def read(self, gather: Callable[[torch.Tensor], torch.Tensor]) -> int | None:
        """The first such step on any rank, None if there was none. gather: concatenates a tensor of all ranks."""
        first = int(gather(self._first).min())
        return None if first == self._NEVER else first


class MetricsFile:
    """RUN/metrics.csv: one row per log interval and one per validation. A metric that a row does not have is an empty cell.

    When a run resumes at step n, the rows after step n are dropped: a killed run wrote them after its last checkpoint.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self._unwritten: list[dict[str, float]] = []
        rows = [row for row in read_metrics(path) if int(row["step"]) <= step] if path.exists() else []
        with files.atomic_write(str(path)) as scratch, scratch.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)

    def write(self, row: dict[str, float]) -> None:
        """Append a row. Raises StorageError if the disk is full or fails; the row is then written with the next one."""
        self._unwritten.append(row)
        text = io.StringIO(newline="")
        csv.DictWriter(text, COLUMNS).writerows(self._unwritten)
        with writing(self.path), self.path.open("ab", buffering=0) as stream:
            end = stream.tell()
            try:
                content = text.getvalue().encode()
                if stream.write(content) != len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                with suppress(OSError):
                    stream.truncate(end)  # no part of a row
                raise
        self._unwritten.clear()


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The rows as text. A last line that is incomplete, because the run was killed, is dropped."""
    with path.open(encoding="utf-8", newline="") as stream:
        return [row for row in csv.DictReader(stream) if row["step"] and None not in row.values()]
