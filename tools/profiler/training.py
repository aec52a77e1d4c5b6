"""The demand of a model, and training from a loader, with interleaved measurements. The demand is the throughput of the train
step alone, on one batch that is repeated.

The train step is train.py's: cross-entropy, SGD with momentum, autocast, channels-last. It does not use Accelerate, which allows
only one precision per process. An accelerator that this machine lacks is emulated by waiting, which leaves the CPU to the loader,
as a GPU would.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import mean
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from tqdm import tqdm

from model.make import make_model
from pipeline.batch import Batch
from pipeline.progress import progress_bar
from pipeline.spec import PRECISIONS, LoaderSpec
from tools.profiler.loaders import PausableLoader, repeated, synchronise
from tools.profiler.measuring import LEAST, NEVER, Estimate, Usage, in_turns, shares, usage
from training.compiling import compile_model
from training.metrics import Clock
from training.optimizers import make_optimizer

MOMENTUM, WEIGHT_DECAY = 0.9, 1e-4
MOST_STEPS = 100  # in a timeline
PART = 8  # a step with this part of a batch is timed first, if there is a time limit


class Consumer(Protocol):
    """Takes batches and computes train steps, or emulates that."""

    what: str  # description
    emulated: bool
    dtype: torch.dtype  # of its input images

    def step(self, batch: Batch) -> None:
        """One train step. On return, a GPU may still be computing it."""


class Model:
    """A model in training, from random weights."""

    emulated = False

    def __init__(self, arch: str, precision: str, spec: LoaderSpec, classes: int, slower_ms: float = 0.0) -> None:
        """arch: for `make_model`. precision: Accelerate's name. slower_ms: milliseconds to wait per image, an injected fault."""
        self.what = f"{arch}, {precision if precision != 'no' else 'float32'}"
        self.dtype = PRECISIONS[precision]
        self._slower = slower_ms / 1e3
        self._kind = torch.device(spec.device).type
        model = make_model(arch, classes, image_size=spec.final_size).to(spec.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.module = model.train()
        self._optimizer = make_optimizer("sgd", model, 1e-3, MOMENTUM, WEIGHT_DECAY, norm_and_bias=True)
        self._scaler = torch.amp.GradScaler(self._kind, enabled=precision == "fp16")

    def autocast(self) -> torch.autocast:
        return torch.autocast(self._kind, self.dtype, enabled=self.dtype != torch.float32)

    def compile(self, mode: str, images: torch.Tensor) -> str | None:
        """Compile the model as train.py does, for images of this shape. Returns why that failed, or None."""
        messages: list[str] = []
        self.module = compile_model(self.module, mode, [images], self.autocast, messages.append)
        return messages[0] if messages else None

    def step(self, batch: Batch) -> None:
        with self.autocast():
            loss = F.cross_entropy(self.module(batch.images), batch.labels)
        self._scaler.scale(loss).backward()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad()
        if self._slower:
            time.sleep(self._slower * len(batch.labels))


class Emulated:
    """An emulated accelerator that trains at a given number of images per second, by waiting."""

    emulated = True

    def __init__(self, images_per_s: float, dtype: torch.dtype, slower_ms: float = 0.0) -> None:
        self.what = f"an emulated accelerator of {images_per_s:,.0f} images/s"
        self.dtype = dtype
        self._seconds = 1 / images_per_s + slower_ms / 1e3

    def step(self, batch: Batch) -> None:
        time.sleep(self._seconds * len(batch.labels))


@dataclass
class Window:
    """Consecutive steps of training. images: their number. usage: utilization during the steps.

    steps: for each step, when it requested a batch, received it, and had finished, in seconds since the first request.
    ready: for each request, the share of the prefetch queue that was filled; empty if unknown.
    """

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
    """Measurements of a consumer. alone: images per second without a loader, by repeat. windows: training from the loader.

    slow: whether a single step takes longer than a measurement should. steps_alone: number of steps in `alone`.
    """

    consumer: Consumer
    spec: LoaderSpec
    alone: list[float] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)
    slow: bool = False
    steps_alone: int = 0

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
        steps = self.windows[-1].steps[:MOST_STEPS]
        return {
            "what": self.consumer.what,
            "emulated": self.consumer.emulated,
            **self.demand.json(),
            "steps_alone": self.steps_alone,
            "training": self.speed.json() | {"steps": sum(len(window.steps) for window in self.windows)},
            "wait_share": self.wait_share,
            "ready": mean(ready) if ready else None,
            **shares([window.usage for window in self.windows]),
            "steps": [dict(zip(("asked", "got", "done"), step, strict=True)) for step in steps],
        }


def measure_training(
    ways: Sequence[tuple[LoaderSpec, Consumer]],
    cold: bool,
    repeats: int,
    seconds: float,
    progress: str,
    kinds: Sequence[str] = ("alone", "together"),
    until: float = NEVER,
) -> list[Training]:
    """Train each consumer on one repeated batch ("alone") and from its own loader ("together"), with interleaved repeats.

    seconds: duration of each measurement, which has at least one step. progress: the progress bar's label. until: as in
    `in_turns`; if two repeats would take longer, batches are made smaller. A consumer whose steps take longer than `seconds` has
    one step of warm-up; others have two, and one more before each measurement from the loader.
    """
    trainings = [Training(consumer, replace(spec, dtype=consumer.dtype)) for spec, consumer in ways]
    opened: list[PausableLoader] = []
    batches: list[Batch] = []
    bar = progress_bar(total=len(trainings) * (2 + len(kinds) * repeats), desc=progress, unit=" measurements")

    def turn(way: tuple[int, str]) -> None:
        number, kind = way
        training = trainings[number]
        if kind == "alone":
            speed, steps = run_alone(training.consumer, batches[number], training.spec.device, seconds)
            training.alone.append(speed)
            training.steps_alone += steps
        else:
            training.windows.append(run_window(training, opened[number], seconds))
        bar.update()

    try:
        for training in trainings:
            batch = first_batch(training, cold, opened)
            if until < NEVER:
                share = (until - time.perf_counter()) / (len(trainings) - len(batches))
                fit(training, batch, 1 + LEAST * len(kinds), share)
            if training.spec.batch_size < len(batch.labels):
                opened.pop().close()
                batch = first_batch(training, cold, opened)
            batches.append(batch)
            warm_up(training, batch, seconds)
            bar.update(2)
        in_turns([(number, kind) for number in range(len(trainings)) for kind in kinds], repeats, turn, until=until)
    finally:
        bar.close()
        for loader in opened:
            loader.close()
    return trainings


def first_batch(training: Training, cold: bool, opened: list[PausableLoader]) -> Batch:
    """Open the loader of a training, append it to `opened`, and return a batch."""
    opened.append(PausableLoader(training.spec, cold))
    opened[-1].resume()
    batch = opened[-1].next()
    opened[-1].pause()
    return batch


def fit(training: Training, batch: Batch, steps: int, seconds: float) -> None:
    """Reduce the batch size of a training so that `steps` steps take at most `seconds`, but not below an eighth or two images.

    A step with an eighth of the batch is timed; a second time if it is slow, because a first step also allocates memory.
    """
    images = len(batch.labels)
    few = min(images, max(2, -(-images // PART)))  # batch normalization needs two images
    part = Batch(batch.images[: few * len(batch.images) // images], batch.labels[:few], batch.ids[:few])
    for _ in range(2):
        took = few / run_alone(training.consumer, part, training.spec.device, 0)[0]
        size = max(few, min(images, int(few * seconds / (steps * took))))
        if size == images:
            return
    training.spec = replace(training.spec, batch_size=size)
    what, training.consumer.what = training.consumer.what, f"{training.consumer.what}, batches of {size}"
    message = f"a step of {what} takes {took * images / few:.0f} s for {images} images: measured with batches of {size}"
    tqdm.write(message, sys.stderr)


def warm_up(training: Training, batch: Batch, seconds: float) -> None:
    """The first steps allocate memory and choose algorithms. Notes whether a step takes longer than `seconds`."""
    speed, _ = run_alone(training.consumer, batch, training.spec.device, 0)
    training.slow = len(batch.labels) / speed > seconds
    if not training.slow:
        training.consumer.step(batch)


def run_alone(consumer: Consumer, batch: Batch, device: str, seconds: float) -> tuple[float, int]:
    """Images per second of the train step on one repeated batch, and the number of steps, at least one."""
    speed, steps = repeated(lambda: consumer.step(batch), seconds, device)
    return len(batch.labels) * speed, steps


def run_window(training: Training, loader: PausableLoader, seconds: float) -> Window:
    """Train from the loader for about `seconds`, after one step of warm-up unless steps are slow."""
    spec, consumer = training.spec, training.consumer
    clock = Clock(torch.device(spec.device))
    loader.resume()
    if not training.slow:
        consumer.step(loader.next())
        synchronise(spec.device)
    moments: list[tuple[Any, Any, Any]] = []
    ready: list[float] = []
    images, left = 0, loader.images_left
    with usage(spec.device) as used:
        began = time.perf_counter()
        while not moments or (time.perf_counter() - began < seconds and images + spec.batch_size <= left):
            queued = loader.ready
            asked = clock.now()
            batch = loader.next()
            got = clock.now()
            consumer.step(batch)
            moments.append((asked, got, clock.now()))
            images += len(batch.labels)
            if queued is not None:
                ready.append(min(1.0, queued / spec.prefetch))
        synchronise(spec.device)
    loader.pause()
    first = moments[0][0]
    return Window(images, used, [tuple(clock.seconds(first, moment) for moment in step) for step in moments], ready)  # type: ignore[misc]
