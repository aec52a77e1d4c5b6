from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from model import ARCHS
from model.responses import norms_of_3x3_layers, responses

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("arch", "layers"), [("resnet20", 19), ("plain56", 55), ("resnet18", 16), ("resnet50", 16), ("resnet34_c", 32)]
)
def test_every_3x3_layer_counts(arch: str, layers: int) -> None:
    """CIFAR's nets: all but the classifier. ImageNet's: not the 7x7 stem, nor 1x1 layers, nor projections."""
    with torch.device("meta"):
        net = ARCHS[arch]()
    names = norms_of_3x3_layers(net)
    assert len(names) == layers
    assert not any("downsample" in name for name in names)
    assert all(norm.num_features == net.get_submodule(name).out_channels for name, norm in names.items())


def test_deviations_are_those_of_the_values_themselves() -> None:
    torch.manual_seed(0)
    net = ARCHS["resnet20"](num_classes=3)
    images = torch.randn(12, 3, 32, 32)
    net.train()(images)  # moves BN's statistics
    found = responses(net, images.split(5), CPU, nullcontext)
    assert not net.training

    values: dict[str, torch.Tensor] = {}
    for name, module in net.named_modules():
        if name in ("bn1", "layer2.0.bn1", "layer3.2.bn2"):
            module.register_forward_hook(lambda _m, _i, out, name=name: values.__setitem__(name, out.clone()))
    with torch.inference_mode():
        net(images)
    deviations = {response.layer: response.std for response in found}
    assert len(deviations) == 19
    for name, value in values.items():
        assert deviations[name.replace("bn", "conv")] == pytest.approx(float(value.std(correction=0)), rel=1e-4)


def test_responses_follow_bns_scale() -> None:
    """In training statistics BN's output has deviation gamma: with gamma 0.1 the layer responds a tenth as much."""
    torch.manual_seed(0)
    net = ARCHS["plain20"]()
    net.train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # its statistics are those of the batch
    nn.init.constant_(net.get_parameter("layer2.1.bn1.weight"), 0.1)
    images = torch.randn(16, 3, 32, 32)
    with torch.no_grad():
        net(images)
    deviations = {response.layer: response.std for response in responses(net, [images], CPU, nullcontext)}
    assert deviations.pop("layer2.1.conv1") == pytest.approx(0.1, rel=0.02)
    assert list(deviations.values()) == pytest.approx([1.0] * 18, rel=0.02)


def test_hooks_are_gone_after_an_error() -> None:
    net = ARCHS["resnet20"]()
    with pytest.raises(RuntimeError):
        responses(net, [torch.zeros(1, 4, 32, 32)], CPU, nullcontext)
    assert not any(module._forward_hooks for module in net.modules())
