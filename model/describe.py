"""The size of a model: its parameters and its multiply-adds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from model.resnet import ARCHS, ResNet


class Description(NamedTuple):
    """A model at one image size. image_size: side of the square image, pixels. multiply_adds: for one image."""

    arch: str
    image_size: int
    parameters: int
    multiply_adds: int


def meta_model(arch: str, **options: Any) -> ResNet:
    """A model in ARCHS on torch's meta device: shapes without values. options: arguments of its constructor."""
    with torch.device("meta"), _NoInit():
        return ARCHS[arch](**options)


class _NoInit(TorchFunctionMode):
    """Skips drawing initial weights, which has no effect on the meta device but takes most of the time there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func in (torch.Tensor.normal_, torch.Tensor.uniform_) else func(*args, **(kwargs or {}))


def describe(arch: str, image_size: int | None = None) -> Description:
    """Describe a model in ARCHS with its default number of classes: 1000, or CIFAR's 10.

    image_size: by default the size that the model is designed for. Multiply-adds are those of the convolutions (BlurPool's, too)
    and of the classifier, one for each product, as the paper counts its "FLOPs". Batch normalization, ReLU, pooling and additions
    count as zero. Nothing is computed: the model is on torch's meta device.
    """
    with torch.device("meta"), torch.no_grad():
        model = meta_model(arch)
        size = image_size or model.image_size
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):  # changes no shape, and takes most of the time on the meta device
                module.forward = _identity  # type: ignore[assignment]
        with FlopCounterMode(display=False) as counter:
            model.eval()(torch.empty(1, 3, size, size))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Description(arch, size, parameters, counter.get_total_flops() // 2)  # it counts two for each multiply-add


def _identity(images: torch.Tensor) -> torch.Tensor:
    return images


def table(descriptions: Sequence[Description]) -> str:
    """One line for each model: image size, parameters, multiply-adds."""
    lines = [f"{'model':<16}{'image size':>12}{'parameters':>14}{'multiply-adds':>16}"]
    for one in descriptions:
        side = f"{one.image_size}x{one.image_size}"
        lines.append(f"{one.arch:<16}{side:>12}{one.parameters / 1e6:>12.2f} M{one.multiply_adds / 1e9:>12.3f} 10^9")
    return "\n".join(lines)
