"""For gpu_check.py: throughput of train steps on the device: from shards, and compared with the reference training scripts.

All steps are compared on one synthetic batch. The reference scripts are:

- torchvision's references/classification/train.py: SGD with momentum, contiguous layout, loss and accuracies read back after
  every step;
- timm's train.py: Nesterov momentum, no weight decay on vectors, the loss read back; contiguous layout, or channels-last, which
  is an option there.

Both use bf16 autocast, without the loss scaling that fp16 would need.
"""

from __future__ import annotations

import gc
import importlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from model.describe import describe as describe_model
from pipeline.loader import Batch
from pipeline.spec import LoaderSpec
from tools.bench.recording import Figure, record
from tools.profiler.loaders import synchronise
from tools.profiler.measuring import in_turns
from tools.profiler.training import MOMENTUM, WEIGHT_DECAY, Model, measure_training, run_alone
from training.optimizers import parameter_groups

CLASSES = 1000
RATIO_GOAL, WAIT_GOAL, STEP_GOAL = 0.98, 0.01, 1.1
# Peak operations/s of the tensor cores in dense bf16: half of the figures with sparsity in NVIDIA's data sheets.
PEAKS = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}
OURS, COMPILED = "ours", "ours, compiled"


def share_of_peak(arch: str, size: int, images_per_s: float, card: str) -> float | None:
    """Share of the tensor cores' peak that training at a given throughput uses; None if the card's peak is not known.

    The backward pass counts as two forward passes, and a multiply-add as two operations. card: its name in torch.
    """
    if card not in PEAKS:
        return None
    return 3 * 2 * describe_model(arch, size).multiply_adds * images_per_s / PEAKS[card]


def card_of(device: str) -> str | None:
    return torch.cuda.get_device_name(torch.device(device)) if device.startswith("cuda") else None


def reset_peak_memory(device: str) -> None:
    """Free the memory of earlier models, and start counting the peak again."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: str) -> dict[str, list[float]]:
    """Peak memory of torch's tensors in GiB, without DALI's buffers; empty without a GPU."""
    return {"peak_memory_gib": [torch.cuda.max_memory_allocated(device) / 2**30]} if device.startswith("cuda") else {}


def measure_train(spec: LoaderSpec, arch: str, results: Path, seconds: float, repeats: int, described: str) -> list[float]:
    """Record images/s of training from shards, and of training on one batch that stays on the device. Returns their ratios.

    seconds: duration of each repeat. described: the rows' spec.
    """
    reset_peak_memory(spec.device)
    consumer = Model(arch, "bf16", spec, CLASSES)
    (found,) = measure_training([(spec, consumer)], False, repeats, seconds, f"train {arch}")
    from_shards = [window.images_per_s for window in found.windows]
    ratios = [rate / ideal for rate, ideal in zip(from_shards, found.alone, strict=True)]
    waits = [window.wait_share for window in found.windows]
    figures = {"images_per_s_synthetic": found.alone, "images_per_s_shards": from_shards, "ratio": ratios, "wait_share": waits}
    figures |= peak_memory(spec.device)
    card = card_of(spec.device)
    if card in PEAKS:
        figures["share_of_peak"] = [share_of_peak(arch, spec.final_size, speed, card) or 0.0 for speed in found.alone]
    rows = [Figure(metric, values) for metric, values in figures.items()]
    record(results, f"train {arch} bf16", *rows, engine=spec.engine, spec=described, cache="warm")
    ratio, wait = float(np.median(ratios)), float(np.median(waits))
    reached = "reached" if ratio >= RATIO_GOAL and wait < WAIT_GOAL else "NOT REACHED"
    print(
        f"train {arch}: {ratio:.3f} of synthetic ({RATIO_GOAL}), data wait {wait:.2%} ({WAIT_GOAL:.0%}): goals {reached}",
        flush=True,
    )
    return ratios


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


def contenders(arch: str, spec: LoaderSpec) -> Iterator[tuple[str, Any, torch.dtype, torch.memory_format]]:
    """Name, consumer, and dtype and layout of its images. Prints which contenders are left out because they are not installed or
    fail."""
    channels_last = torch.channels_last
    yield OURS, Model(arch, "bf16", spec, CLASSES), torch.bfloat16, channels_last
    model = Model(arch, "bf16", spec, CLASSES)
    failure = model.compile("default", synthetic(spec, torch.bfloat16, channels_last).images)
    if failure is None:
        yield COMPILED, model, torch.bfloat16, channels_last
    else:
        print(f"train step: {failure}", flush=True)
    for package, make in (("torchvision", "torchvision.models"), ("timm", "timm")):
        try:
            module = importlib.import_module(make)
        except ImportError:
            print(f"train step: {package} is not installed, nothing to compare with", flush=True)
            continue
        layouts = {"": torch.contiguous_format} | ({", channels-last": channels_last} if package == "timm" else {})
        for suffix, layout in layouts.items():
            other = module.create_model(arch, num_classes=CLASSES) if package == "timm" else getattr(module, arch)()
            yield package + suffix, PlainStep(other, spec.device, layout, package), torch.float32, layout


def synthetic(spec: LoaderSpec, dtype: torch.dtype, layout: torch.memory_format) -> Batch:
    """A random batch on the device."""
    size, count = spec.final_size, spec.batch_size
    torch.manual_seed(0)
    images = torch.randn(count, 3, size, size).to(spec.device, dtype, memory_format=layout)
    return Batch(images, torch.randint(CLASSES, (count,)).to(spec.device), np.arange(count))


def measure_steps(
    spec: LoaderSpec, arch: str, results: Path, seconds: float, repeats: int, described: str
) -> dict[str, list[float]]:
    """Record images/s of each contender's train step on one batch, in turns, and the ratios of our throughput to the others'.
    Returns images/s by name and repeat. described: the rows' spec."""
    reset_peak_memory(spec.device)
    spec = replace(spec, dtype=torch.bfloat16)
    steps: dict[str, tuple[Any, Batch]] = {}
    for name, consumer, dtype, layout in contenders(arch, spec):
        batch = synthetic(spec, dtype, layout)
        for _ in range(3):  # the first steps allocate and choose algorithms
            consumer.step(batch)
        synchronise(spec.device)
        steps[name] = consumer, batch
    speeds: dict[str, list[float]] = {name: [] for name in steps}

    def turn(name: str) -> None:
        speeds[name].append(run_alone(*steps[name], spec.device, seconds).images_per_s)

    in_turns(list(steps), repeats, turn)
    best = max((name for name in (OURS, COMPILED) if name in speeds), key=lambda name: np.median(speeds[name]))
    for name, values in speeds.items():
        figures = {"images_per_s": values}
        if not name.startswith(OURS):
            for mine in (OURS, COMPILED):
                if mine in speeds:
                    ratios = [own / other for own, other in zip(speeds[mine], values, strict=True)]
                    figures[f"ratio_of_{mine}".replace(", ", "_")] = ratios
            ratio = float(np.median(speeds[best]) / np.median(values))
            reached = "reached" if ratio >= STEP_GOAL else "NOT REACHED"
            print(f"train step: {best} is {ratio:.2f} x {name} (goal {STEP_GOAL}): {reached}", flush=True)
        elif name == COMPILED:
            figures["ratio_to_ours"] = [fast / eager for fast, eager in zip(values, speeds[OURS], strict=True)]
        rows = [Figure(metric, found) for metric, found in figures.items()]
        record(results, f"train step, {arch} bf16", *rows, engine=name, spec=described, cache="warm")
    return speeds
