from __future__ import annotations

import csv
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from model import ARCHS
from model.weights import ModelConfig, save_weights
from pipeline.store.shards import Manifest
from tests.helpers import run_forked
from tools.paper.layer_responses import norms_of_3x3_layers, responses

pytestmark = pytest.mark.usefixtures("one_core")

CPU = torch.device("cpu")


@pytest.mark.slow
def test_two_models_in_one_figure(small_shards: Path, tmp_path: Path) -> None:
    classes = Manifest(small_shards).classes
    torch.manual_seed(0)
    for arch in ("plain20", "resnet20"):
        zero, one = np.full(3, 120, np.float32), np.full(3, 60, np.float32)
        config = ModelConfig(arch, classes, 32, 32, zero, one)
        save_weights(tmp_path / f"{arch}.safetensors", ARCHS[arch](num_classes=3).state_dict(), config.header())
    files = [tmp_path / "plain20.safetensors", tmp_path / "resnet20.safetensors"]
    options = ("--data", small_shards, "--images", 10, "--batch-size", 8)
    result = run_forked(
        "tools/paper/layer_responses.py", *files, *options, "--output", tmp_path / "f.png", "--csv", tmp_path / "f.csv"
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "plain20, 19 layers, mean std" in result.stdout
    with (tmp_path / "f.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 2 * 19
    assert all(float(row["std"]) > 0 for row in rows)
    pixels = np.asarray(Image.open(tmp_path / "f.png").convert("RGB")).reshape(-1, 3)
    for color in ((31, 119, 180), (255, 127, 14)):  # one line each, in matplotlib's first two colours
        assert (pixels == color).all(axis=1).sum() > 100

    fewer = run_forked("tools/paper/layer_responses.py", files[0], "--data", small_shards, "--images", 2,
                       "--csv", tmp_path / "g.csv", "--output", tmp_path / "g.png")  # fmt: skip
    assert fewer.returncode == 0, fewer.stderr
    assert (tmp_path / "g.csv").read_text().splitlines()[1:] != (tmp_path / "f.csv").read_text().splitlines()[1:20]


@pytest.mark.parametrize(
    ("arch", "layers"), [("resnet20", 19), ("plain56", 55), ("resnet18", 16), ("resnet50", 16), ("resnet34_c", 32)]
)
def test_every_3x3_layer_counts(arch: str, layers: int) -> None:
    """CIFAR models: all layers but the classifier. ImageNet models: neither the 7x7 stem, nor 1x1 layers, nor projections."""
    with torch.device("meta"):
        model = ARCHS[arch]()
    names = norms_of_3x3_layers(model)
    assert len(names) == layers
    assert not any("downsample" in name for name in names)
    assert all(norm.num_features == model.get_submodule(name).out_channels for name, norm in names.items())


def test_deviations_are_those_of_the_outputs() -> None:
    torch.manual_seed(0)
    model = ARCHS["resnet20"](num_classes=3)
    images = torch.randn(12, 3, 32, 32)
    model.train()(images)  # moves BN's statistics
    found = responses(model, images.split(5), CPU, nullcontext)
    assert not model.training

    values: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if name in ("bn1", "layer2.0.bn1", "layer3.2.bn2"):
            module.register_forward_hook(lambda _m, _i, out, name=name: values.__setitem__(name, out.clone()))
    with torch.inference_mode():
        model(images)
    deviations = {response.layer: response.std for response in found}
    assert len(deviations) == 19
    for name, value in values.items():
        assert deviations[name.replace("bn", "conv")] == pytest.approx(float(value.std(correction=0)), rel=1e-4)


def test_responses_follow_bns_scale() -> None:
    """With the statistics of the batch, the deviation of BN's output is gamma: with gamma 0.1, it is a tenth of the others'."""
    torch.manual_seed(0)
    model = ARCHS["plain20"]()
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # its statistics are those of the batch
    nn.init.constant_(model.get_parameter("layer2.1.bn1.weight"), 0.1)
    images = torch.randn(16, 3, 32, 32)
    with torch.no_grad():
        model(images)
    deviations = {response.layer: response.std for response in responses(model, [images], CPU, nullcontext)}
    assert deviations.pop("layer2.1.conv1") == pytest.approx(0.1, rel=0.02)
    assert list(deviations.values()) == pytest.approx([1.0] * 18, rel=0.02)


def test_hooks_are_gone_after_an_error() -> None:
    model = ARCHS["resnet20"]()
    with pytest.raises(RuntimeError):
        responses(model, [torch.zeros(1, 4, 32, 32)], CPU, nullcontext)
    assert not any(module._forward_hooks for module in model.modules())
