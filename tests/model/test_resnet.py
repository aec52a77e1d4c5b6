from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model import ARCHS
from model.describe import describe, table
from model.loading import initial_weights, load_model
from model.resnet import BasicBlock, Block, GlobalAverage, ResNet, ZeroPadding, option_b, pad_at_end
from model.weights import ModelConfig, save_weights
from tests.layout import LayoutCheck

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
    """Keys and shapes of torchvision's state dicts, derived from its naming rule, independently of our modules."""
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
        model = ARCHS[arch]()
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[arch]
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert found == torchvision_shapes(DEPTHS[arch], bottleneck=int(arch[6:]) >= 50)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_logits_match_torchvision(arch: str) -> None:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    model, reference = ARCHS[arch]().eval(), getattr(models, arch)().eval()
    reference.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 96, 64)
    assert torch.allclose(model(images), reference(images), atol=1e-5)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_stages_have_the_output_sizes_of_table_1(arch: str) -> None:
    model = ARCHS[arch](num_classes=7).eval()
    sizes: dict[str, tuple[int, ...]] = {}
    for name in ("conv1", "layer1", "layer2", "layer3", "layer4"):
        getattr(model, name).register_forward_hook(lambda _m, _i, out, name=name: sizes.__setitem__(name, tuple(out.shape[2:])))
    assert model(torch.zeros(1, 3, 224, 224)).shape == (1, 7)
    assert sizes == {"conv1": (112, 112), "layer1": (56, 56), "layer2": (28, 28), "layer3": (14, 14), "layer4": (7, 7)}


@pytest.mark.parametrize("arch", ["plain18", "resnet18", "resnet34_a", "resnet34_c", "resnet50", "resnet50_v1", "resnet56"])
def test_initial_weights_follow_he_et_al(arch: str) -> None:
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
    """If its last BN is zero, a block computes relu(x): y = F(x) + x of figure 2 with F = 0."""
    block = BasicBlock(64, 64, 1, option_b).eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.randn(1, 64, 8, 8)
    assert torch.equal(block(x), x.relu())


# The paper's figures: table 1's last row, and 3.6 for the plain network in section 4.1. 3.8 is with the stride on the 1x1.
@pytest.mark.parametrize(
    ("arch", "paper"),
    [
        ("plain18", 1.8), ("resnet18", 1.8), ("resnet18_a", 1.8), ("plain34", 3.6), ("resnet34_a", 3.6),
        ("resnet50_v1", 3.8), ("resnet101_v1", 7.6), ("resnet152_v1", 11.3),
    ],
)  # fmt: skip
def test_multiply_adds_match_the_paper(arch: str, paper: float) -> None:
    """The paper gives one decimal, which is truncated for ResNet-50 (3.86) and rounded for the others."""
    assert abs(describe(arch).multiply_adds / 1e9 - paper) < 0.065


@pytest.mark.parametrize(
    ("layers", "millions"), [(20, "0.27"), (32, "0.46"), (44, "0.66"), (56, "0.85"), (110, "1.7"), (1202, "19.4")]
)
def test_parameters_of_cifar_models_match_table_6(layers: int, millions: str) -> None:
    with torch.device("meta"):
        model = ARCHS[f"resnet{layers}"]()
    decimals = len(millions.split(".")[1])
    assert f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.{decimals}f}" == millions
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) + 1 == layers  # and the classifier
    assert model.fc.out_features == 10


def test_multiply_adds_of_a_model_follow_from_its_shapes() -> None:
    """ResNet-20, computed by hand from the table in section 4.2: kernel area x channels in x channels out x pixels."""
    hand = 9 * 3 * 16 * 32**2 + 6 * 9 * 16 * 16 * 32**2
    hand += 9 * 16 * 32 * 16**2 + 5 * 9 * 32 * 32 * 16**2
    hand += 9 * 32 * 64 * 8**2 + 5 * 9 * 64 * 64 * 8**2 + 64 * 10
    assert describe("resnet20").multiply_adds == hand
    assert describe("resnet20", 64).multiply_adds == 4 * (hand - 640) + 640


@pytest.mark.slow
def test_the_table_lists_all_models() -> None:
    lines = table([describe(arch) for arch in ARCHS]).splitlines()[1:]
    assert [line.split()[0] for line in lines] == list(ARCHS)
    row = next(line for line in lines if line.startswith("resnet152_v1"))
    assert row.split() == ["resnet152_v1", "224x224", "60.19", "M", "11.282", "10^9"]


@pytest.mark.parametrize(
    "arch", ["plain18", "resnet18", "resnet18_a", "resnet18_c", "resnet50", "resnet50_c", "resnet50_v1", "resnet20", "plain56"]
)
def test_gradients_reach_all_parameters_of_every_kind_of_model(arch: str) -> None:
    model = ARCHS[arch](num_classes=3)
    logits = model(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 3)
    F.cross_entropy(logits, torch.tensor([0, 2])).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("arch", "projections"),
    [
        ("plain34", 0),
        ("resnet34_a", 0),
        ("resnet34", 3),
        ("resnet34_c", 16),
        ("resnet50", 4),
        ("resnet50_c", 16),
        ("resnet110", 0),
    ],
)
def test_shortcuts_have_the_parameters_of_their_option(arch: str, projections: int) -> None:
    names = [name for name, _ in ARCHS[arch]().named_parameters() if "downsample" in name]
    assert len([name for name in names if name.endswith("downsample.0.weight")]) == projections
    assert len(names) == 3 * projections  # the convolution, and BN's scale and shift


def test_plain_and_residual_models_differ_only_in_their_shortcuts() -> None:
    """Plain models and residual models with option A have the same parameters (section 4.1) and, with the same seed, the same
    weights."""
    torch.manual_seed(3)
    plain = ARCHS["plain34"](num_classes=2).state_dict()
    torch.manual_seed(3)
    residual = ARCHS["resnet34_a"](num_classes=2).state_dict()
    assert plain.keys() == residual.keys()
    assert all(torch.equal(plain[name], residual[name]) for name in plain)


def test_zero_padding_is_the_subsampled_input_and_zeros() -> None:
    x = torch.randn(2, 3, 5, 4)
    out = ZeroPadding(4, 2)(x)
    assert out.shape == (2, 7, 3, 2)
    for channel in range(7):
        for row in range(3):
            for column in range(2):
                expected = x[:, channel - 2, 2 * row, 2 * column] if 2 <= channel < 5 else torch.zeros(2)
                assert torch.equal(out[:, channel, row, column], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mean_over_positions_is_that_of_torchs_pooling(dtype: torch.dtype) -> None:
    for shape in ((2, 512, 7, 7), (1, 65, 10, 13), (3, 64, 1, 1)):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(shape).to(dtype, memory_format=layout)
            assert torch.equal(GlobalAverage()(x), nn.AdaptiveAvgPool2d(1)(x))


def shallow(arch: str) -> tuple[tuple[Any, ...], partial[ResNet]]:
    """What distinguishes the layers of an architecture from those of others, and the model with two blocks in each stage."""
    make = ARCHS[arch]
    block, depths = make.args[0], (2,) * len(make.args[1])
    options = {key: value for key, value in make.keywords.items() if key != "width"}
    return (block, depths, *options.items()), partial(make.func, block, depths, width=16, **options)


KINDS = dict(shallow(arch) for arch in ARCHS)


@pytest.mark.usefixtures("one_core")
@pytest.mark.parametrize("kind", KINDS, ids=range(len(KINDS)))
def test_activations_and_gradients_of_all_layers_are_channels_last(kind: tuple[Any, ...]) -> None:
    """Otherwise, layers copy their inputs or use slower kernels."""
    make = KINDS[kind]
    for drop_path in (0.0, 0.5) if make.keywords.get("shortcut", option_b) else (0.0,):
        model = make(drop_path=drop_path).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        found = LayoutCheck(model)
        side = 32 if make.keywords.get("small") else 64
        images = torch.randn(2, 3, side, side).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(drop_path)):
            loss = F.cross_entropy(model(images), torch.tensor([0, 1]))
        loss.backward()
        assert found.others() == []
        assert found.tensors > 3 * len(list(model.modules()))


@pytest.mark.parametrize(("arch", "strides"), [("resnet50", (1, 2, 1)), ("resnet50_v1", (2, 1, 1)), ("resnet101_v1", (2, 1, 1))])
def test_the_position_of_the_bottlenecks_stride(arch: str, strides: tuple[int, ...]) -> None:
    with torch.device("meta"):
        model = ARCHS[arch]()
    for name in ("layer2", "layer3", "layer4"):
        first = getattr(model, name)[0]
        assert tuple(getattr(first, f"conv{index}").stride[0] for index in (1, 2, 3)) == strides
        assert first.downsample[0].stride == (2, 2)


def cifar_forward(weights: dict[str, torch.Tensor], images: torch.Tensor, before: tuple[int, int] | None) -> torch.Tensor:
    """Logits of the 20-layer model of section 4.2, written with torch.nn.functional.

    before: for the two shortcuts where dimensions grow, how many of the new channels come before the others. None: no shortcuts.
    """

    def conv_bn(x: torch.Tensor, conv: str, norm: str, stride: int) -> torch.Tensor:
        x = F.conv2d(x, weights[f"{conv}.weight"], stride=stride, padding=1)
        mean, var, scale, shift = (weights[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, var, scale, shift)

    x = conv_bn(images, "conv1", "bn1", 1).relu()
    for stage in (1, 2, 3):
        for block in range(3):
            stride = 2 if stage > 1 and block == 0 else 1
            name = f"layer{stage}.{block}"
            out = conv_bn(conv_bn(x, f"{name}.conv1", f"{name}.bn1", stride).relu(), f"{name}.conv2", f"{name}.bn2", 1)
            if before and stride == 2:
                small = x[:, :, ::2, ::2]
                zeros = torch.zeros_like(small).split([before[stage - 2], small.shape[1] - before[stage - 2]], 1)
                x = torch.cat([zeros[0], small, zeros[1]], 1)
            x = (out + x if before else out).relu()
    return F.linear(x.mean((2, 3)), weights["fc.weight"], weights["fc.bias"])


def cifar_weights(arch: str) -> dict[str, torch.Tensor]:
    """Random weights, with running statistics that differ from a new model's."""
    torch.manual_seed(0)
    state = ARCHS[arch]().state_dict()
    for name, tensor in state.items():
        if name.endswith("running_mean"):
            tensor.uniform_(-1, 1)
        elif name.endswith(("running_var", "bn2.weight", "bn2.bias")):
            tensor.uniform_(0.5, 2)
    return state


BOTH_SIDES, AT_END = (8, 16), (0, 0)


@pytest.mark.parametrize(("arch", "before"), [("plain20", None), ("resnet20", BOTH_SIDES)])
def test_cifar_models_follow_section_4_2(arch: str, before: tuple[int, int] | None) -> None:
    weights, images = cifar_weights(arch), torch.randn(2, 3, 32, 32)
    model = ARCHS[arch]().eval()
    model.load_state_dict(weights)
    assert torch.allclose(model(images), cifar_forward(weights, images, before), atol=1e-4, rtol=1e-4)


def test_weights_of_version_0_1_which_appended_channels_give_the_same_logits(tmp_path: Path) -> None:
    """Such a file has no key that says where option A pads."""
    weights, images = cifar_weights("resnet20"), torch.randn(2, 3, 32, 32)
    config = ModelConfig("resnet20", [], 32, 32, np.zeros(3, np.float32), np.ones(3, np.float32))
    for name, pads_at_end, before in (("old", True, AT_END), ("new", False, BOTH_SIDES)):
        save_weights(tmp_path / f"{name}.safetensors", weights, replace(config, pads_at_end=pads_at_end).header())
        model, found = load_model(tmp_path / f"{name}.safetensors", None, None)
        expected = cifar_forward(weights, images, before)
        assert torch.allclose(model.eval()(images), expected, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(expected, cifar_forward(weights, images, BOTH_SIDES if pads_at_end else AT_END), atol=0.1)
        assert not found.pads_at_end
        again = ARCHS["resnet20"]()
        initial_weights(tmp_path / f"{name}.safetensors", "resnet20", again, [str(label) for label in range(10)])
        assert torch.allclose(again.eval()(images), expected, atol=1e-4, rtol=1e-4)
    assert "padding" not in replace(config, pads_at_end=True).header()
    assert "padding" not in replace(config, arch="resnet18").header()
    continued = ARCHS["resnet20"]().eval()
    continued.load_state_dict(weights)
    pad_at_end(continued)
    assert torch.allclose(continued(images), cifar_forward(weights, images, AT_END), atol=1e-4, rtol=1e-4)


def test_published_weights_for_cifar_load(tmp_path: Path) -> None:
    """The layout of github.com/akamaster/pytorch_resnet_cifar10: DataParallel's prefix, `linear` for the classifier."""
    weights, images = cifar_weights("resnet20"), torch.randn(2, 3, 32, 32)
    names = {name: f"module.{name.replace('fc.', 'linear.')}" for name in weights}
    content = {"state_dict": {names[name]: tensor for name, tensor in weights.items()}, "best_prec1": torch.tensor(91.73)}
    torch.save(content, tmp_path / "resnet20-12fca82f.th")
    model, config = load_model(tmp_path / "resnet20-12fca82f.th", None, None)
    assert torch.allclose(model.eval()(images), cifar_forward(weights, images, BOTH_SIDES), atol=1e-4, rtol=1e-4)
    assert (config.arch, config.eval_short, config.image_size) == ("resnet20", 32, 32)
    assert config.origin == "the file's name (12fca82f)"
    assert sum(isinstance(module, Block) for module in model.modules()) == 9
