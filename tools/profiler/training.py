"""What a model eats: its train step on one synthetic batch, and training from a loader, in turns.

The train step is train.py's: cross-entropy, SGD with momentum, autocast, channels-last. (Without Accelerate, whose precision is
the same for a whole process.) An accelerator that is not here is emulated by waiting: it leaves the CPU to the loader, as a GPU
does.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import mean
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import ARCHS
from pipeline.loader import Batch
from pipeline.spec import PRECISIONS, LoaderSpec
from tools.profiler.loaders import Opened, synchronise
from tools.profiler.measuring import Estimate, Usage, in_turns, usage
from training.compiling import compiled
from training.metrics import Clock
from training.optimizers import make_optimizer

MOMENTUM, WEIGHT_DECAY = 0.9, 1e-4
MOST_STEPS = 100  # that a timeline shows


class Consumer(Protocol):
    """Computes train steps."""

    what: str  # in words
    emulated: bool
    dtype: torch.dtype  # of the images that it takes

    def step(self, batch: Batch) -> None:
        """One update; a GPU may still compute it when this returns."""


class Model:
    """A net being trained. Weights stay random: labels of a batch are all that it learns."""

    emulated = False

    def __init__(self, arch: str, precision: str, spec: LoaderSpec, classes: int, slower_ms: float = 0.0) -> None:
        """arch: a name in ARCHS. precision: Accelerate's name. slower_ms: a planted fault, of waiting for each image."""
        self.what = f"{arch}, {precision if precision != 'no' else 'float32'}"
        self.dtype = PRECISIONS[precision]
        self._slower = slower_ms / 1e3
        self._kind = torch.device(spec.device).type
        net = ARCHS[arch](num_classes=classes).to(spec.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._net = net.train()
        self._optimizer = make_optimizer("sgd", net, 1e-3, MOMENTUM, WEIGHT_DECAY, norm_and_bias=True)
        self._scaler = torch.amp.GradScaler(self._kind, enabled=precision == "fp16")

    def autocast(self) -> torch.autocast:
        return torch.autocast(self._kind, self.dtype, enabled=self.dtype != torch.float32)

    def compile(self, mode: str, images: torch.Tensor) -> str | None:
        """torch.compile the net as train.py does, for images of this shape; why that does not work, if it does not."""
        told: list[str] = []
        self._net = compiled(self._net, mode, [images], self.autocast, told.append)
        return told[0] if told else None

    def step(self, batch: Batch) -> None:
        with self.autocast():
            loss = F.cross_entropy(self._net(batch.images), batch.labels)
        self._scaler.scale(loss).backward()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad()
        if self._slower:
            time.sleep(self._slower * len(batch.labels))


class Emulated:
    """An accelerator that eats so many images a second."""

    emulated = True

    def __init__(self, images_per_s: float, dtype: torch.dtype, slower_ms: float = 0.0) -> None:
        self.what = f"an emulated accelerator of {images_per_s:,.0f} images/s"
        self.dtype = dtype
        self._seconds = 1 / images_per_s + slower_ms / 1e3

    def step(self, batch: Batch) -> None:
        time.sleep(self._seconds * len(batch.labels))


@dataclass
class Window:
    """Some steps of training. usage: what they took. steps: of each when it asked for a batch, got it, and had computed, seconds
    from the first's asking. ready: share of the prefetch depth that lay ready at each asking, where known."""

    images: int
    usage: Usage
    steps: list[tuple[float, float, float]]
    ready: list[float]

    @property
    def images_per_s(self) -> float:
        return self.images / self.steps[-1][2]

    @property
    def wait_share(self) -> float:
        return sum(got - asked for asked, got, _ in self.steps) / self.steps[-1][2]


@dataclass
class Training:
    """What a consumer did, in turns: alone (images a second), and from the loader."""

    consumer: Consumer
    spec: LoaderSpec
    alone: list[float] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)

    @property
    def demand(self) -> Estimate:
        return Estimate.of_speeds(self.alone)

    @property
    def speed(self) -> Estimate:
        return Estimate.of_speeds([window.images_per_s for window in self.windows])

    @property
    def wait_share(self) -> float:
        return mean(window.wait_share for window in self.windows)

    def json(self) -> dict[str, Any]:
        ready = [share for window in self.windows for share in window.ready]
        shares: dict[str, float | None] = {}
        for name in ("cpu_share", "gpu_share", "jpeg_share"):
            known = [share for window in self.windows if (share := getattr(window.usage, name)) is not None]
            shares[name] = mean(known) if known else None
        steps = self.windows[-1].steps[:MOST_STEPS]
        return {
            "what": self.consumer.what,
            "emulated": self.consumer.emulated,
            **self.demand.json(),
            "training": self.speed.json(),
            "wait_share": self.wait_share,
            "ready": mean(ready) if ready else None,
            **shares,
            "steps": [dict(zip(("asked", "got", "done"), step, strict=True)) for step in steps],
        }


def measure_training(
    ways: Sequence[tuple[LoaderSpec, Consumer]], cold: bool, repeats: int, seconds: float, progress: str, alone: bool = True
) -> list[Training]:
    """Train each consumer from its own loader and, if asked for, alone on one batch of it, in turns of so many seconds, a step at
    least. progress: what the bar is called."""
    trainings = [Training(consumer, replace(spec, dtype=consumer.dtype)) for spec, consumer in ways]
    opened = [Opened(training.spec, cold) for training in trainings]
    batches: list[Batch] = []
    kinds = (True, False) if alone else (False,)
    bar = tqdm(total=len(trainings) * (2 + len(kinds) * repeats), desc=progress, unit=" turns")

    def turn(way: tuple[int, bool]) -> None:
        number, is_alone = way
        training = trainings[number]
        if is_alone:
            training.alone.append(run_alone(training.consumer, batches[number], training.spec.device, seconds))
        else:
            training.windows.append(run_window(training, opened[number], seconds))
        bar.update()

    try:
        for training, loader in zip(trainings, opened, strict=True):
            loader.begin()
            batches.append(loader.next())
            loader.end()
            for _ in range(2):  # the first steps allocate and choose algorithms
                training.consumer.step(batches[-1])
                bar.update()
        in_turns([(number, kind) for number in range(len(trainings)) for kind in kinds], repeats, turn)
    finally:
        bar.close()
        for loader in opened:
            loader.close()
    return trainings


def run_alone(consumer: Consumer, batch: Batch, device: str, seconds: float) -> float:
    """Images a second of the train step on one batch."""
    synchronise(device)
    began, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - began < seconds:
        consumer.step(batch)
        count += len(batch.labels)
    synchronise(device)
    return count / (time.perf_counter() - began)


def run_window(training: Training, opened: Opened, seconds: float) -> Window:
    """Train from the loader for so long, after a step that does not count."""
    spec, consumer = training.spec, training.consumer
    clock = Clock(torch.device(spec.device))
    opened.begin()
    consumer.step(opened.next())
    synchronise(spec.device)
    moments: list[tuple[Any, Any, Any]] = []
    ready: list[float] = []
    images, left = 0, opened.left
    with usage(spec.device) as taken:
        began = time.perf_counter()
        while not moments or (time.perf_counter() - began < seconds and images + spec.batch_size <= left):
            waiting = opened.ready
            asked = clock.now()
            batch = opened.next()
            got = clock.now()
            consumer.step(batch)
            moments.append((asked, got, clock.now()))
            images += len(batch.labels)
            if waiting is not None:
                ready.append(min(1.0, waiting / spec.prefetch))
        synchronise(spec.device)
    opened.end()
    first = moments[0][0]
    return Window(images, taken, [tuple(clock.seconds(first, moment) for moment in step) for step in moments], ready)  # type: ignore[misc]
