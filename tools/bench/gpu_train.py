"""For gpu_check.py: throughput of train steps on the device: from shards, and compared with the reference training scripts.

All steps are compared on one synthetic batch, in turns. The reference scripts are:

- torchvision's references/classification/train.py: SGD with momentum, contiguous layout, loss and accuracies read back after
  every step;
- timm's train.py: Nesterov momentum, no weight decay on vectors, the loss read back; contiguous layout, or channels-last, which
  is an option there.

Both use bf16 autocast, without the loss scaling that fp16 would need.
"""

from __future__ import annotations

import gc
import importlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.batch import Batch
from pipeline.spec import LoaderSpec
from tools.bench.gpu_setting import Setting, engines, use_of
from tools.bench.recording import ratios
from tools.profiler.loaders import synchronise
from tools.profiler.measuring import in_turns
from tools.profiler.training import MOMENTUM, WEIGHT_DECAY, Model, measure_training, run_alone
from training.averaging import WeightEMA
from training.launch import gradient_exchange
from training.optimizers import parameter_groups

CLASSES = 1000
RATIO_GOAL, WAIT_GOAL, STEP_GOAL = 0.98, 0.01, 1.1
MOVED_LIMIT = 0.1  # of the relative difference of two averages after three steps, which bf16 rounds differently
OURS, COMPILED, GRAPHS = "ours", "ours, compiled", "reduce-overhead"
INSIDE, OUTSIDE = "compiled inside", "compiled outside"  # of DistributedDataParallel


def reset_peak_memory(device: str) -> None:
    """Free the memory of earlier models, and start counting the peak again."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: str) -> dict[str, list[float]]:
    """Peak memory of torch's tensors in GiB, without DALI's buffers; empty without a GPU."""
    return {"peak_memory_gib": [torch.cuda.max_memory_allocated(device) / 2**30]} if device.startswith("cuda") else {}


def measure_train(setting: Setting) -> Iterator[bool]:
    """Record images/s of training each model from shards by each engine, and on one batch that stays on the device."""
    for arch in setting.archs:
        for engine in engines():
            measure_training_of(setting, arch, replace(setting.spec, engine=engine))
            yield True


def measure_training_of(setting: Setting, arch: str, spec: LoaderSpec) -> None:
    """Record training from one loader, and print whether it reaches the goals."""
    reset_peak_memory(spec.device)
    consumer = Model(arch, "bf16", spec, CLASSES)
    (found,) = measure_training([(spec, consumer)], False, setting.repeats, setting.seconds, f"train {arch}")
    from_shards = [window.images_per_s for window in found.windows]
    achieved = ratios(from_shards, found.alone)
    waits = [window.wait_share for window in found.windows]
    figures = {"images_per_s_synthetic": found.alone, "images_per_s_shards": from_shards, "ratio": achieved, "wait_share": waits}
    figures |= use_of([window.usage for window in found.windows], [window.images for window in found.windows])
    figures |= peak_memory(spec.device)
    setting.record(f"train {arch} bf16", spec.engine, figures, spec)
    ratio, wait = float(np.median(achieved)), float(np.median(waits))
    reached = "reached" if ratio >= RATIO_GOAL and wait < WAIT_GOAL else "NOT REACHED"
    shown = f"{ratio:.3f} of synthetic ({RATIO_GOAL}), data wait {wait:.2%} ({WAIT_GOAL:.0%}): goals {reached}"
    print(f"train {arch}, {spec.engine}: {shown}", flush=True)


class PlainStep:
    """The train step of a reference script, on float32 images."""

    def __init__(self, model: nn.Module, device: str, layout: torch.memory_format, script: str) -> None:
        """script: "torchvision" or "timm"."""
        self._model = model.to(device, memory_format=layout).train()  # type: ignore[call-overload]
        self._kind, self._script = torch.device(device).type, script
        timm = script == "timm"
        groups = parameter_groups(model, WEIGHT_DECAY, norm_and_bias=not timm)
        self._optimizer = torch.optim.SGD(groups, 1e-3, MOMENTUM, nesterov=timm)

    def step(self, batch: Batch) -> None:
        with torch.autocast(self._kind, torch.bfloat16):
            output = self._model(batch.images)
            loss = F.cross_entropy(output, batch.labels)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        if self._script == "torchvision":
            right = output.topk(5, 1).indices.t().eq(batch.labels[None])
            for count in (1, 5):
                right[:count].flatten().sum(dtype=torch.float32).item()
        loss.item()


Contender = tuple[Any, torch.dtype, torch.memory_format]  # a consumer, and dtype and layout of its images


def ours(arch: str, spec: LoaderSpec) -> Iterator[tuple[str, Contender]]:
    """Our step, eager and compiled, with their names. Prints why the latter is left out, if compiling fails."""
    channels_last = torch.channels_last
    yield OURS, (Model(arch, "bf16", spec, CLASSES), torch.bfloat16, channels_last)
    model = Model(arch, "bf16", spec, CLASSES)
    failure = model.compile("default", synthetic(spec, torch.bfloat16, channels_last).images)
    if failure is None:
        yield COMPILED, (model, torch.bfloat16, channels_last)
    else:
        print(f"train step: {failure}", flush=True)


def others(arch: str, spec: LoaderSpec) -> Iterator[tuple[str, Contender]]:
    """The steps of the reference scripts. Prints which are left out because they are not installed."""
    for package, make in (("torchvision", "torchvision.models"), ("timm", "timm")):
        try:
            module = importlib.import_module(make)
        except ImportError:
            print(f"train step: {package} is not installed, nothing to compare with", flush=True)
            continue
        layouts = {"": torch.contiguous_format} | ({", channels-last": torch.channels_last} if package == "timm" else {})
        for suffix, layout in layouts.items():
            other = module.create_model(arch, num_classes=CLASSES) if package == "timm" else getattr(module, arch)()
            yield package + suffix, (PlainStep(other, spec.device, layout, package), torch.float32, layout)


def synthetic(spec: LoaderSpec, dtype: torch.dtype, layout: torch.memory_format) -> Batch:
    """A random batch on the device."""
    size, count = spec.final_size, spec.batch_size
    torch.manual_seed(0)
    images = torch.randn(count, 3, size, size).to(spec.device, dtype, memory_format=layout)
    return Batch(images, torch.randint(CLASSES, (count,)).to(spec.device), np.arange(count))


def measure_steps(setting: Setting) -> Iterator[bool]:
    """Record images/s of our train steps on one batch, then of each other one in turns with ours, and the ratios to it."""
    arch, spec = setting.archs[0], replace(setting.spec, dtype=torch.bfloat16)
    reset_peak_memory(spec.device)
    mine = {name: ready(contender, spec) for name, contender in ours(arch, spec)}
    speeds = speeds_in_turns(setting, mine)
    for name, values in speeds.items():
        figures = {"images_per_s": values}
        if name == COMPILED:
            figures["ratio_to_ours"] = ratios(values, speeds[OURS])
        setting.record(f"train step, {arch} bf16", name, figures, spec)
    yield True
    for name, contender in others(arch, spec):
        speeds = speeds_in_turns(setting, mine | {name: ready(contender, spec)})
        figures = {"images_per_s": speeds[name]}
        for own in mine:
            figures[f"ratio_of_{own}".replace(", ", "_")] = ratios(speeds[own], speeds[name])
        setting.record(f"train step, {arch} bf16", name, figures, spec)
        best = max(mine, key=lambda own: np.median(speeds[own]))
        ratio = float(np.median(speeds[best]) / np.median(speeds[name]))
        reached = "reached" if ratio >= STEP_GOAL else "NOT REACHED"
        print(f"train step: {best} is {ratio:.2f} x {name} (goal {STEP_GOAL}): {reached}", flush=True)
        yield True


def ready(contender: Contender, spec: LoaderSpec) -> tuple[Any, Batch]:
    """A consumer after its first steps, which allocate and choose algorithms, and its batch."""
    consumer, dtype, layout = contender
    batch = synthetic(spec, dtype, layout)
    for _ in range(3):
        consumer.step(batch)
    synchronise(spec.device)
    return consumer, batch


def speeds_in_turns(setting: Setting, steps: Mapping[str, tuple[Any, Batch]]) -> dict[str, list[float]]:
    """Images/s of each consumer on its batch, by repeat."""
    speeds: dict[str, list[float]] = {name: [] for name in steps}

    def turn(name: str) -> None:
        speeds[name].append(run_alone(*steps[name], setting.spec.device, setting.seconds / 4)[0])

    in_turns(list(steps), setting.repeats, turn)
    return speeds


class Averaged:
    """A model in training, with a moving average of its weights."""

    def __init__(self, model: Model) -> None:
        self._model, self._module = model, model.module  # before it is compiled
        self._before = self._weights(self._module)
        self._average = WeightEMA(self._module, 0.9)

    def step(self, batch: Batch) -> None:
        self._model.step(batch)
        self._average.update(self._module)

    def moved(self) -> torch.Tensor:
        """How far the average has moved: a vector."""
        return self._weights(self._average.model) - self._before

    @staticmethod
    def _weights(module: nn.Module) -> torch.Tensor:
        return torch.cat([value.detach().float().flatten() for value in module.parameters()])


def measure_graphs(setting: Setting) -> Iterator[bool]:
    """Record the train step with an average of the weights, eager and with CUDA graphs (reduce-overhead). Both averages must move
    alike from the same weights and batch."""
    arch, spec = setting.archs[0], replace(setting.spec, dtype=torch.bfloat16)
    reset_peak_memory(spec.device)
    steps, moved = {}, {}
    for name in ("eager", GRAPHS):
        torch.manual_seed(0)
        model = Model(arch, "bf16", spec, CLASSES)
        averaged = Averaged(model)
        failure = model.compile(GRAPHS, synthetic(spec, spec.dtype, torch.channels_last).images) if name == GRAPHS else None
        if failure:
            print(f"train step, {GRAPHS}: {failure}", flush=True)
            return
        steps[name] = ready((averaged, spec.dtype, torch.channels_last), spec)
        moved[name] = averaged.moved()
    speeds = speeds_in_turns(setting, steps)
    difference = float((moved[GRAPHS] - moved["eager"]).norm() / moved["eager"].norm())
    figures = {"images_per_s": speeds[GRAPHS], "relative_difference_of_average": [difference]}
    figures["ratio_to_eager"] = ratios(speeds[GRAPHS], speeds["eager"])
    setting.record(f"train step with EMA, {arch} bf16", GRAPHS, figures, spec)
    yield difference < MOVED_LIMIT


def wrapped(arch: str, spec: LoaderSpec, compiled: str | None) -> Model | None:
    """A model in DistributedDataParallel as train.py wraps it, compiled before that (INSIDE, as there), after it, or not at all.
    Prints why it cannot be compiled."""
    model, images = Model(arch, "bf16", spec, CLASSES), synthetic(spec, spec.dtype, torch.channels_last).images
    failure = model.compile("default", images) if compiled == INSIDE else None
    model.module = DistributedDataParallel(model.module, **gradient_exchange(1, None).to_kwargs())
    failure = model.compile("default", images) if compiled == OUTSIDE else failure
    if failure:
        print(f"train step in DDP, {compiled}: {failure}", flush=True)
    return None if failure else model


def measure_wrapped(setting: Setting) -> Iterator[bool]:
    """Record the train step in DistributedDataParallel, in one process: compiled inside of it against eager, then outside against
    inside. Inside, the model is one graph. Outside, torch divides it so that gradients are exchanged during the backward pass;
    this is what the division costs, without what it gains between several GPUs."""
    arch, spec = setting.archs[0], replace(setting.spec, dtype=torch.bfloat16)
    reset_peak_memory(spec.device)
    distributed.init_process_group("nccl" if setting.gpu else "gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        before, steps = "eager", {"eager": wrapped(arch, spec, None)}
        for name in (INSIDE, OUTSIDE):
            steps[name] = wrapped(arch, spec, name)
            if steps[name] is None:
                return
            pair = {one: ready((steps[one], spec.dtype, torch.channels_last), spec) for one in (before, name)}
            speeds = speeds_in_turns(setting, pair)
            figures = {"images_per_s": speeds[name], f"ratio_to_{before.replace(' ', '_')}": ratios(speeds[name], speeds[before])}
            setting.record(f"train step in DDP, {arch} bf16", name, figures, spec)
            yield True
            before = name
    finally:
        distributed.destroy_process_group()
