from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from model import ARCHS
from model.resnet import BasicBlock

PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
}
DEPTHS = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
}


def torchvision_shapes(depths: tuple[int, ...], bottleneck: bool) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of torchvision's state dicts, from its naming rule, independently of our modules."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(name: str, out: int, into: int, kernel: int) -> None:
        shapes[f"{name}.weight"] = (out, into, kernel, kernel)

    def norm(name: str, channels: int) -> None:
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{part}"] = (channels,)
        shapes[f"{name}.num_batches_tracked"] = ()

    conv("conv1", 64, 3, 7)
    norm("bn1", 64)
    into = 64
    for stage, depth in enumerate(depths, 1):
        width = 64 * 2 ** (stage - 1)
        for block in range(depth):
            name = f"layer{stage}.{block}"
            plan = [(width, 1), (width, 3), (4 * width, 1)] if bottleneck else [(width, 3), (width, 3)]
            first = into
            for index, (out, kernel) in enumerate(plan, 1):
                conv(f"{name}.conv{index}", out, into, kernel)
                norm(f"{name}.bn{index}", out)
                into = out
            if block == 0 and first != into:
                conv(f"{name}.downsample.0", into, first, 1)
                norm(f"{name}.downsample.1", into)
    shapes["fc.weight"], shapes["fc.bias"] = (1000, into), (1000,)
    return shapes


@pytest.mark.parametrize("arch", PARAMETERS)
def test_parameters_keys_and_shapes(arch: str) -> None:
    with torch.device("meta"):
        net = ARCHS[arch]()
    assert sum(parameter.numel() for parameter in net.parameters()) == PARAMETERS[arch]
    found = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    assert found == torchvision_shapes(DEPTHS[arch], bottleneck=int(arch[6:]) >= 50)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_logits_are_torchvisions(arch: str) -> None:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    ours, theirs = ARCHS[arch]().eval(), getattr(models, arch)().eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 96, 64)
    assert torch.allclose(ours(images), theirs(images), atol=1e-5)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_stages_have_table_1s_output_sizes(arch: str) -> None:
    net = ARCHS[arch](num_classes=7).eval()
    sizes: dict[str, tuple[int, ...]] = {}
    for name in ("conv1", "layer1", "layer2", "layer3", "layer4"):
        getattr(net, name).register_forward_hook(lambda _m, _i, out, name=name: sizes.__setitem__(name, tuple(out.shape[2:])))
    assert net(torch.zeros(1, 3, 224, 224)).shape == (1, 7)
    assert sizes == {"conv1": (112, 112), "layer1": (56, 56), "layer2": (28, 28), "layer3": (14, 14), "layer4": (7, 7)}


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_weights_are_drawn_as_he_et_al_have_it(arch: str) -> None:
    torch.manual_seed(0)
    for name, module in ARCHS[arch]().named_modules():
        if isinstance(module, nn.Conv2d):
            count = module.weight.numel()
            expected = math.sqrt(2 / (module.out_channels * module.kernel_size[0] * module.kernel_size[1]))
            assert abs(float(module.weight.detach().std()) / expected - 1) < 5 / math.sqrt(2 * count), name
            assert abs(float(module.weight.detach().mean())) < 5 * expected / math.sqrt(count), name
            assert module.bias is None
        elif isinstance(module, nn.BatchNorm2d):
            assert bool((module.weight == 1).all())
            assert bool((module.bias == 0).all())


def test_an_identity_shortcut_adds_its_input() -> None:
    """With its last BN at zero a block is relu(x): Figure 2's y = F(x) + x with F = 0."""
    block = BasicBlock(64, 64, 1).eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.randn(1, 64, 8, 8)
    assert torch.equal(block(x), x.relu())
