"""What a net consists of: its stages as in Table 1 of He et al. 2015, its parameters and its multiply-adds."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from model.resnet import ARCHS, Block, ResNet


class Stage(NamedTuple):
    """A row of Table 1. output: (channels, height, width). multiply_adds: of one picture."""

    name: str
    output: tuple[int, ...]
    layers: str
    parameters: int
    multiply_adds: int


class Description(NamedTuple):
    """A net at one picture size. image_size: the picture's side, pixels. multiply_adds: of one picture."""

    arch: str
    image_size: int
    stages: list[Stage]
    parameters: int
    multiply_adds: int


def meta_model(arch: str, **options: Any) -> ResNet:
    """A net in ARCHS on torch's meta device: shapes without numbers. options: its constructor's."""
    with torch.device("meta"), _NothingDrawn():
        return ARCHS[arch](**options)


class _NothingDrawn(TorchFunctionMode):
    """Initial weights are not drawn: on the meta device there are none, but it takes most of the time to make a net there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func in (torch.Tensor.normal_, torch.Tensor.uniform_) else func(*args, **(kwargs or {}))


def describe(arch: str, image_size: int | None = None) -> Description:
    """Of a net in ARCHS with its usual number of classes (1000, or CIFAR's 10), for square pictures.

    Multiply-adds are those of the convolutions (BlurPool's, too) and of the classifier, one for each product, as the paper counts
    its "FLOPs"; batch normalization, ReLU, pooling and additions count nothing. Nothing is computed: the net lies on torch's meta
    device.
    """
    with torch.device("meta"), torch.no_grad():
        net = meta_model(arch)
        size = image_size or net.image_size
        outputs: dict[str, tuple[int, ...]] = {}
        names = ["conv1", *net.stage_names, "fc"]
        for name in names:
            getattr(net, name).register_forward_hook(_remember(outputs, name))
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):  # changes no shape, and takes most of the time on the meta device
                module.forward = _unchanged  # type: ignore[assignment]
        with FlopCounterMode(display=False) as counter:
            net.eval()(torch.empty(1, 3, size, size))
    counts = counter.get_flop_counts()  # two for each multiply-add
    stages = []
    for name in names:
        module = getattr(net, name)
        multiply_adds = sum(counts.get(f"ResNet.{name}", {}).values()) // 2
        parameters = _parameters(module) + (_parameters(net.bn1) if name == "conv1" else 0)
        stages.append(Stage(name, outputs[name], _layers(net, name), parameters, multiply_adds))
    return Description(arch, size, stages, _parameters(net), counter.get_total_flops() // 2)


def _unchanged(images: torch.Tensor) -> torch.Tensor:
    return images


def _remember(outputs: dict[str, tuple[int, ...]], name: str) -> Any:
    def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        outputs[name] = tuple(output.shape[1:])

    return hook


def _layers(net: ResNet, name: str) -> str:
    """The layers of a stage in Table 1's words."""
    module = getattr(net, name)
    if isinstance(module, nn.Conv2d):
        pooling = "" if isinstance(net.maxpool, nn.Identity) else "; 3x3 max pool, stride 2"
        return f"{_convolution(module)}, stride {module.stride[0]}{pooling}"
    if isinstance(module, nn.Linear):
        return f"average pool, {module.out_features}-d fc, softmax"
    block = module[0]
    assert isinstance(block, Block)
    convolutions = [_convolution(layer) for layer in block.children() if isinstance(layer, nn.Conv2d)]
    return f"[{'; '.join(convolutions)}] x {len(module)}"


def _convolution(layer: nn.Conv2d) -> str:
    return f"{layer.kernel_size[0]}x{layer.kernel_size[1]}, {layer.out_channels}"


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def table(descriptions: list[Description]) -> str:
    """A line a net: picture size, parameters, multiply-adds."""
    lines = [f"{'net':<16}{'picture':>9}{'parameters':>14}{'multiply-adds':>16}"]
    for one in descriptions:
        side = f"{one.image_size}x{one.image_size}"
        lines.append(f"{one.arch:<16}{side:>9}{one.parameters / 1e6:>12.2f} M{one.multiply_adds / 1e9:>12.3f} 10^9")
    return "\n".join(lines)


def table_1(one: Description) -> str:
    """A line a stage, as in Table 1."""
    lines = [f"{one.arch}, pictures of {one.image_size}x{one.image_size}"]
    lines.append(f"{'layer':<8}{'output':>14}  {'layers':<42}{'parameters':>14}{'multiply-adds':>16}")
    for stage in one.stages:
        output = "x".join(map(str, stage.output))
        lines.append(f"{stage.name:<8}{output:>14}  {stage.layers:<42}{stage.parameters:>14,}{stage.multiply_adds:>16,}")
    lines.append(f"{'all':<8}{'':>14}  {'':<42}{one.parameters:>14,}{one.multiply_adds:>16,}")
    return "\n".join(lines)
