from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from model import ARCHS
from model.loading import _identify, arch_of_name, initial_weights, load_model, weights_file
from model.preprocessing import ASSUMED, PUBLISHED, published_config
from model.weights import ModelConfig, save_weights
from pipeline.errors import UserError
from tests.model.test_resnet import torchvision_shapes

pytestmark = pytest.mark.usefixtures("one_core")

Weights = dict[str, torch.Tensor]
DEPTHS = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3)}


@cache
def torchvision_state(arch: str, classes: int = 1000) -> Weights:
    """Random weights with torchvision's names and shapes, including running statistics, scaled to give logits of usual size."""
    generator = torch.Generator().manual_seed(len(arch) + classes)
    state: Weights = {}
    for name, shape in torchvision_shapes(DEPTHS[arch], arch == "resnet50").items():
        shape = (classes, *shape[1:]) if name.startswith("fc.") else shape
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(1234)
        elif len(shape) == 4:
            state[name] = torch.randn(shape, generator=generator) * (2 / (shape[1] * shape[2] * shape[3])) ** 0.5
        elif len(shape) == 2:
            state[name] = torch.randn(shape, generator=generator) * shape[1] ** -0.5
        elif name.endswith(("running_var", "weight")):
            state[name] = torch.rand(shape, generator=generator) * 0.5 + 0.5
        else:
            state[name] = torch.randn(shape, generator=generator) * 0.2
    return state


def plain_forward(weights: Weights, x: torch.Tensor, depths: tuple[int, ...], bottleneck: bool) -> torch.Tensor:
    """Logits from torchvision's keys, computed with torch.nn.functional. He et al. 2015, with the stride on 3x3 convolutions."""

    def conv(x: torch.Tensor, name: str, stride: int = 1, padding: int = 0) -> torch.Tensor:
        return F.conv2d(x, weights[f"{name}.weight"], None, stride, padding)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        mean, var, scale, shift = (weights[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, var, scale, shift, training=False, eps=1e-5)

    x = F.relu(norm(conv(x, "conv1", 2, 3), "bn1"))
    x = F.max_pool2d(x, 3, 2, 1)
    for stage, depth in enumerate(depths, 1):
        for block in range(depth):
            name = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            if bottleneck:
                out = F.relu(norm(conv(x, f"{name}.conv1"), f"{name}.bn1"))
                out = F.relu(norm(conv(out, f"{name}.conv2", stride, 1), f"{name}.bn2"))
                out = norm(conv(out, f"{name}.conv3"), f"{name}.bn3")
            else:
                out = F.relu(norm(conv(x, f"{name}.conv1", stride, 1), f"{name}.bn1"))
                out = norm(conv(out, f"{name}.conv2", 1, 1), f"{name}.bn2")
            if f"{name}.downsample.0.weight" in weights:
                x = norm(conv(x, f"{name}.downsample.0", stride), f"{name}.downsample.1")
            x = F.relu(out + x)
    return F.linear(x.mean((2, 3)), weights["fc.weight"], weights["fc.bias"])


def assert_same_logits(model: torch.nn.Module, weights: Weights, arch: str) -> None:
    x = torch.randn(2, 3, 96, 80, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        expected = plain_forward(weights, x, DEPTHS[arch], arch == "resnet50")
        found = model.eval()(x)
    assert expected.std() > 0.1
    assert (expected[0] - expected[1]).abs().max() > 0.01  # they depend on the images
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def write_timm_folder(folder: Path, weights: Weights, **changes: Any) -> Path:
    """Write a folder as timm.models.save_for_hf does. changes: top-level entries of config.json."""
    folder.mkdir(parents=True)
    config = {
        "architecture": "resnet18",
        "num_classes": 7,
        "num_features": 512,
        "pretrained_cfg": {
            "tag": "a1_in1k", "num_classes": 7, "input_size": [3, 160, 160], "test_input_size": [3, 288, 288],
            "crop_pct": 0.95, "interpolation": "bicubic", "mean": [0.5, 0.25, 0.125], "std": [0.5, 0.5, 0.25],
            "first_conv": "conv1", "classifier": "fc",
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config | changes))
    save_file(weights, folder / "model.safetensors")
    return folder


CLASSES = [f"n{index:08d}" for index in range(1000)]
SEVEN = CLASSES[:7]


@pytest.mark.parametrize("arch", DEPTHS)
def test_torchvision_files_give_the_logits_of_a_plain_forward_pass(arch: str, tmp_path: Path) -> None:
    weights = torchvision_state(arch)
    torch.save(weights, tmp_path / f"{arch}-0123abcd.pth")
    save_file(weights, tmp_path / f"{arch}.tv2_in1k.safetensors")
    for name, short in ((f"{arch}-0123abcd.pth", 256), (f"{arch}.tv2_in1k.safetensors", 232)):
        model, config = load_model(weights_file(tmp_path / name), None, CLASSES)
        assert_same_logits(model, weights, arch)
        assert (config.arch, config.classes, config.image_size, config.eval_short) == (arch, CLASSES, 224, short)
        assert config.mean == pytest.approx([123.675, 116.28, 103.53])
        assert config.std == pytest.approx([58.395, 57.12, 57.375])


def test_checkpoints_in_common_layouts(tmp_path: Path) -> None:
    weights = torchvision_state("resnet18", 7)
    old = {name: tensor for name, tensor in weights.items() if not name.endswith("num_batches_tracked")}
    compiled = {f"module._orig_mod.{name}": tensor for name, tensor in weights.items()}
    zeros = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    averaged = {"n_averaged": torch.tensor(3)} | {f"module.{name}": tensor for name, tensor in weights.items()}
    contents: dict[str, Any] = {
        "old.pth": old,
        "compiled.pt": {"model": compiled},
        "timm.bin": {"state_dict": zeros, "state_dict_ema": weights, "epoch": 3},
        "reference.pth": {"model": zeros, "model_ema": averaged, "optimizer": {}},
        "nested.pth": {"model": {"state_dict": weights}},
    }
    for name, content in contents.items():
        torch.save(content, tmp_path / name)
        model, _ = load_model(tmp_path / name, "resnet18", SEVEN)
        assert_same_logits(model, weights, "resnet18")
    assert load_model(tmp_path / "old.pth", "resnet18", None)[0].state_dict()["bn1.num_batches_tracked"] == 0
    assert load_model(tmp_path / "compiled.pt", "resnet18", None)[0].state_dict()["bn1.num_batches_tracked"] == 1234

    half = {name: tensor.half() if "conv" in name else tensor for name, tensor in weights.items()}
    torch.save(half, tmp_path / "half.pth")
    model, config = load_model(tmp_path / "half.pth", "resnet18", None)
    assert config.classes == []
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32, torch.int64}
    assert_same_logits(model, {name: tensor.float() for name, tensor in half.items()}, "resnet18")


def test_file_names_give_the_architecture() -> None:
    for name, arch in {
        "resnet50-0676ba61.pth": "resnet50",
        "resnet50.a1_in1k.safetensors": "resnet50",
        "resnet50_v1-1234.pth": "resnet50_v1",
        "resnet18_a1_0-d63eafa0.pth": "resnet18",
        "resnet18_a.pth": "resnet18_a",
        "resnet152": "resnet152",
        "resnet50d_ra2.pth": None,
        "resnet501.pth": None,
        "wide_resnet50_2.pth": None,
        "model.pth": None,
    }.items():
        assert arch_of_name(name) == arch, name


@pytest.mark.parametrize(
    ("name", "short", "crop"),
    [
        # https://docs.pytorch.org/vision/stable/models/resnet.html, "inference transforms" of each ResNet*_Weights
        ("resnet18-f37072fd.pth", 256, 224),  # IMAGENET1K_V1
        ("resnet34-b627a593.pth", 256, 224),
        ("resnet50-0676ba61.pth", 256, 224),
        ("resnet50-11ad3fa6.pth", 232, 224),  # IMAGENET1K_V2
        ("resnet101-63fe2227.pth", 256, 224),
        ("resnet101-cd907fc2.pth", 232, 224),
        ("resnet152-394f9c45.pth", 256, 224),
        ("resnet152-f82ba261.pth", 232, 224),
        ("resnet50-11ad3fa6 (1).pth", 232, 224),
        # The test sizes of default_cfgs in https://github.com/huggingface/pytorch-image-models/blob/main/timm/models/resnet.py,
        # with floor(size / crop_pct)
        ("resnet50_a1_0-14fe96d1.pth", 288, 288),
        ("resnet50.a1_in1k.safetensors", 288, 288),
        ("resnet50.a3_in1k.safetensors", 235, 224),
        ("resnet50.a1h_in1k.safetensors", 224, 224),
        ("resnet101.a1h_in1k.safetensors", 288, 288),
        ("resnet152_a3_0-134d4688.pth", 235, 224),
        ("resnet50.ra_in1k.safetensors", 303, 288),
        ("resnet50.tv2_in1k.safetensors", 232, 224),
    ],
)
def test_published_files_are_tested_at_their_published_size(name: str, short: int, crop: int, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"weights")
    config = published_config(tmp_path / name, "resnet50")
    assert (config.eval_short, config.image_size) == (short, crop)
    bicubic = " (bicubic)" if "tv" not in name and "_" in name else ""
    assert config.preprocessing.startswith(
        f"short side {short}{bicubic}, crop {crop}, mean (123.68, 116.28, 103.53), std (58.395, 57.12, 57.375), "
        "from the file's name ("
    )
    assert config.resizing == "torchvision"


def test_renamed_files_are_recognized_by_their_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 46_830_571  # of torchvision's resnet18-f37072fd.pth
    with (tmp_path / "best.pth").open("wb") as file:
        file.truncate(size)
    config = published_config(tmp_path / "best.pth", "resnet18")
    assert (config.eval_short, config.image_size, config.origin) == (256, 224, ASSUMED)
    digits = hashlib.sha256(bytes(size)).hexdigest()[:8]
    monkeypatch.setitem(PUBLISHED, digits, (232, 224, "bilinear"))
    config = published_config(tmp_path / "best.pth", "resnet18")
    assert (config.eval_short, config.image_size) == (232, 224)
    assert config.origin == f"the file's content (SHA-256 {digits}...)"
    small = published_config(tmp_path / "best.pth", "resnet20")  # CIFAR's images are not resized
    assert (small.eval_short, small.image_size, small.origin) == (32, 32, ASSUMED)


@pytest.mark.parametrize(("arch", "size"), [("resnet18", 46_000_000), ("resnet50", 46_830_571), ("resnet18", 200_000_000)])
def test_files_of_another_size_are_not_read_to_compare_their_content(
    arch: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.store.files.sha256", lambda path: pytest.fail("the file was read"))
    with (tmp_path / "best.pth").open("wb") as file:
        file.truncate(size)
    assert published_config(tmp_path / "best.pth", arch).origin == ASSUMED


@pytest.mark.parametrize(
    ("entries", "size", "short"),
    [
        # resnet50.tv2_in1k, resnet50.a3_in1k, resnet50.tv_in1k as on the Hub
        ({"input_size": [3, 176, 176], "test_input_size": [3, 224, 224], "crop_pct": 0.875, "test_crop_pct": 0.965}, 224, 232),
        ({"input_size": [3, 160, 160], "test_input_size": [3, 224, 224], "crop_pct": 0.95, "test_crop_pct": 0.95}, 224, 235),
        ({"input_size": [3, 224, 224], "crop_pct": 0.875}, 224, 256),
        ({"input_size": [3, 224, 224], "test_input_size": None, "crop_pct": None, "mean": None, "std": None}, 224, 256),
        ({}, 224, 256),
    ],
)
def test_timm_folders_are_tested_as_in_timms_validation(entries: dict[str, Any], size: int, short: int, tmp_path: Path) -> None:
    weights = {"fc.weight": torch.zeros(7, 512)}
    folder = write_timm_folder(tmp_path / "timm", weights, pretrained_cfg=entries | {"interpolation": "bilinear"})
    _, config = _identify(folder / "model.safetensors", {}, None)
    assert config is not None
    assert (config.image_size, config.eval_short) == (size, short)
    assert config.origin == "its config.json"
    assert config.mean == pytest.approx([123.675, 116.28, 103.53])
    changed = write_timm_folder(tmp_path / "other", weights, pretrained_cfg=entries | {"x": 1, "crop_mode": "squash"})
    _, config = _identify(changed / "model.safetensors", {}, None)
    assert config is not None
    assert (config.resizing, config.interpolation) == ("square", "bicubic")
    assert config.preprocessing.startswith(f"both sides {short} (bicubic), crop {size}, ")
    for wrong in (
        {"crop_pct": 1.2},
        {"crop_pct": float("nan")},
        {"crop_pct": -1},
        {"test_input_size": [3, 0, 0]},
        {"input_size": [3, 224, 168]},
    ):
        damaged = write_timm_folder(tmp_path / str(wrong), weights, pretrained_cfg={"x": 1} | wrong)
        with pytest.raises(UserError, match=r"config\.json: is damaged"):
            _identify(damaged / "model.safetensors", {}, None)


@pytest.mark.slow
def test_timm_folders(tmp_path: Path) -> None:
    weights = torchvision_state("resnet18", 7)
    folder = write_timm_folder(tmp_path / "new", weights)
    model, config = load_model(folder, None, SEVEN)
    assert_same_logits(model, weights, "resnet18")
    assert (config.arch, config.classes, config.image_size, config.eval_short) == ("resnet18", SEVEN, 288, 303)  # 288 / 0.95
    assert config.mean.tolist() == [127.5, 63.75, 31.875]
    assert config.std.tolist() == [127.5, 127.5, 63.75]
    assert config.mean.dtype == config.std.dtype == np.float32

    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert_same_logits(load_model(folder, None, None)[0], weights, "resnet18")

    named = write_timm_folder(tmp_path / "named", weights, label_names=SEVEN)
    assert load_model(named, None, None)[1].classes == SEVEN
    with pytest.raises(UserError, match=r"its 7 classes differ from the 7 of the data: class 2 is '.+', in the data 'new'; give"):
        load_model(named, None, [*SEVEN[:2], "new", *SEVEN[3:]])
    flat = write_timm_folder(tmp_path / "old", weights, pretrained_cfg=None, input_size=[3, 224, 224], mean=[0, 0, 1])
    config = load_model(flat, None, SEVEN)[1]
    assert (config.image_size, config.eval_short, config.mean.tolist()) == (224, 256, [0, 0, 255])

    for changes, words in (
        ({"architecture": "resnet50"}, "does not fit resnet50"),
        ({"architecture": "resnet18q"}, "holds a resnet18q: .*timm"),
        ({"model_args": {"output_stride": 8}}, "model_args"),
        ({"pretrained_cfg": {"input_size": 3}}, "config.json: is damaged"),
        ({"label_names": ["a"]}, "names 1 classes, but has 7 outputs"),
    ):
        other = write_timm_folder(tmp_path / words[:18], weights, **changes)
        with pytest.raises(UserError, match=words) as caught:
            load_model(other, None, SEVEN)
        assert str(other) in str(caught.value)
    with pytest.raises(UserError, match="holds a resnet18, but `arch` is resnet50"):
        load_model(tmp_path / "named", "resnet50", SEVEN)


def test_hub_repositories_load_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache has huggingface_hub's layout: models--USER--NAME/refs/REVISION contains the name of a folder in snapshots."""
    weights = torchvision_state("resnet18", 7)
    cache, sha = tmp_path / "models--timm--resnet18.a1_in1k", "0123456789" * 4
    write_timm_folder(cache / "snapshots" / sha, weights)
    (cache / "refs").mkdir()
    for revision in ("main", "v2"):
        (cache / "refs" / revision).write_text(sha)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    sources: list[str | Path] = [
        "hf://timm/resnet18.a1_in1k",
        "hf://timm/resnet18.a1_in1k@v2",
        Path("hf://timm/resnet18.a1_in1k"),
    ]
    for source in [*sources, f"hf://timm/resnet18.a1_in1k@{sha}"]:
        model, config = load_model(source, None, SEVEN)
        assert_same_logits(model, weights, "resnet18")
        assert config.image_size == 288
    (cache / "snapshots" / sha / "model.safetensors").unlink()
    torch.save(weights, cache / "snapshots" / sha / "pytorch_model.bin")
    assert_same_logits(load_model(sources[0], None, None)[0], weights, "resnet18")
    for source, words in (
        ("hf://timm/resnet18.a1_in1k@v3", "cannot be downloaded"),
        ("hf://timm/absent", "cannot be downloaded"),
        ("hf://timm", "is not a repository"),
        ("hf://timm/resnet18.a1_in1k/model.safetensors", "is not a repository"),
    ):
        with pytest.raises(UserError, match=rf"^{source}: {words}[^\n]*$"):
            weights_file(source)


@pytest.mark.slow
def test_mismatches_are_named(tmp_path: Path) -> None:
    weights = torchvision_state("resnet18", 7)
    deep = {name.replace("conv1.", "conv1.0.") if name == "conv1.weight" else name: value for name, value in weights.items()}
    transformers = {f"resnet.embedder.embedder.{name}": tensor for name, tensor in weights.items()}
    wide = weights | {"layer1.0.conv2.weight": torch.zeros(64, 128, 3, 3)}
    for name, content, arch, words in (
        (
            "deep.pth",
            deep,
            "resnet18",
            r"deep.pth: does not fit resnet18 \(no conv1.weight, but conv1.0.weight\); its model is not supported",
        ),
        ("hugging.pth", transformers, "resnet18", "transformers"),
        ("wide.pth", wide, "resnet18", r"\(layer1.0.conv2.weight is \(64, 128, 3, 3\), not \(64, 64, 3, 3\)\)"),
        ("resnet34.pth", weights, None, r"does not fit resnet34 \(no layer1.2.conv1.weight\); it fits `arch` resnet18$"),
        ("more.pth", weights | {"head.bias": torch.zeros(3)}, "resnet18", r"\(unexpected head.bias\)"),
        ("headless.pth", {k: v for k, v in weights.items() if "fc" not in k}, "resnet18", r"\(no fc.weight\)"),
        ("model.pth", weights, None, "model.pth: does not say which model it holds; give `arch`"),
        ("model.pth", weights, "vgg", "unknown `arch` 'vgg'; choose from plain18"),
    ):
        torch.save(content, tmp_path / name)
        with pytest.raises(UserError, match=words) as caught:
            load_model(tmp_path / name, arch, SEVEN)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="its 7 classes differ from the 6 of the data"):
        load_model(tmp_path / "model.pth", "resnet18", SEVEN[:6])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: contains no weights"):
        weights_file(tmp_path / "empty")


def test_cropfeeds_files_contain_architecture_and_classes(tmp_path: Path) -> None:
    config = ModelConfig("resnet18", SEVEN, 112, 128, np.full((112, 112, 3), 7, np.float32), np.ones(3, np.float32))
    weights = torchvision_state("resnet18", 7)
    (tmp_path / "run" / "checkpoints" / "last").mkdir(parents=True)
    save_weights(tmp_path / "run" / "checkpoints" / "last" / "model.safetensors", weights, config.header())
    (tmp_path / "run" / "config.json").write_text('{"command": []}')
    model, found = load_model(tmp_path / "run", None, SEVEN)
    assert_same_logits(model, weights, "resnet18")
    assert found.image_size == 112
    assert found.mean.shape == (112, 112, 3)
    assert load_model(str(tmp_path / "run"), "resnet18", None)[1].classes == SEVEN
    for arch, classes in ((None, SEVEN[::-1]), ("resnet34", SEVEN), (None, SEVEN[:3])):
        with pytest.raises(UserError, match=r"its 7 classes differ|holds a resnet18, but `arch` is resnet34"):
            load_model(tmp_path / "run", arch, classes)
    save_weights(tmp_path / "bad.safetensors", weights, config.header() | {"mean": "[]"})
    with pytest.raises(UserError, match=r"bad.safetensors: the header is damaged"):
        load_model(tmp_path / "bad.safetensors", None, SEVEN)


@pytest.mark.slow
def test_initial_weights_for_fine_tuning(tmp_path: Path) -> None:
    weights = torchvision_state("resnet18", 7)
    torch.save(weights, tmp_path / "model.pth")
    model = ARCHS["resnet18"](num_classes=7)
    assert "including the classifier" in initial_weights(tmp_path / "model.pth", "resnet18", model, SEVEN)
    assert_same_logits(model, weights, "resnet18")

    config = ModelConfig("resnet18", SEVEN, 112, 128, np.ones(3, np.float32), np.ones(3, np.float32))
    save_weights(tmp_path / "ours.safetensors", weights, config.header())
    torch.save({name: tensor for name, tensor in weights.items() if "fc" not in name}, tmp_path / "headless.pth")
    for name, classes, words in (
        ("model.pth", SEVEN[:4], "classifier: it is initialized anew for 4 classes, because the file's is for 7 classes"),
        ("ours.safetensors", SEVEN[::-1], "because the file's is for 7 other classes"),
        ("headless.pth", SEVEN, "because the file has none"),
    ):
        model = ARCHS["resnet18"](num_classes=len(classes))
        own = {"fc.weight": model.fc.weight.detach().clone(), "fc.bias": model.fc.bias.detach().clone()}
        assert words in initial_weights(tmp_path / name, "resnet18", model, classes)
        assert_same_logits(model, weights | own, "resnet18")
    model = ARCHS["resnet18"](num_classes=7)
    assert "including the classifier" in initial_weights(tmp_path / "ours.safetensors", "resnet18", model, SEVEN)

    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save(torchvision_state("resnet50", 7), tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other.pth: does not fit resnet18 .*; it fits `arch` resnet50 or resnet50_v1"):
        initial_weights(tmp_path / "other.pth", "resnet18", model, SEVEN[:4])
    with pytest.raises(UserError, match="holds a resnet18, but `arch` is resnet18_c"):
        initial_weights(tmp_path / "ours.safetensors", "resnet18_c", ARCHS["resnet18_c"](num_classes=7), SEVEN)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
