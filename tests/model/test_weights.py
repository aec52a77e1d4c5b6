from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from model import ARCHS
from model.loading import load_model
from model.weights import ModelConfig, load_weights, save_weights
from pipeline.errors import UserError

CONFIG = ModelConfig(
    "resnet18",
    ["a", "b"],
    112,
    128,
    np.random.default_rng(0).uniform(0, 255, (112, 112, 3)).astype(np.float32),
    np.ones(3, np.float32),
)


def test_weights_and_config_round_trip(tmp_path: Path) -> None:
    model = ARCHS["resnet18"](num_classes=2).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    save_weights(tmp_path / "model.safetensors", model.state_dict(), CONFIG.header())
    weights, header = load_weights(tmp_path / "model.safetensors")
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    config = ModelConfig.from_header(header)
    assert config is not None
    assert (config.arch, config.classes, config.image_size, config.eval_short) == ("resnet18", ["a", "b"], 112, 128)
    assert np.array_equal(config.mean, CONFIG.mean)
    assert np.array_equal(config.std, CONFIG.std)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()  # no other keys


def test_pth_files_in_common_layouts_load(tmp_path: Path) -> None:
    state = ARCHS["resnet18"](num_classes=2).state_dict()
    wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
    nested = {f"module.model._orig_mod.backbone.{name}": tensor for name, tensor in state.items()}
    head = {f"head.{name}" if name.startswith("fc.") else f"backbone.{name}": tensor for name, tensor in state.items()}
    save_file(nested, tmp_path / "nested.safetensors")
    for name, content in {
        "plain.pth": state, "wrapped.pth.tar": {"state_dict": wrapped, "epoch": 3}, "model.th": {"model": state},
        "lightning.ckpt": {"state_dict": nested, "hyper_parameters": {}}, "kuangliu.pth": {"net": wrapped, "acc": 9.5},
        "ema.bin": {"model_state_dict": {}, "state_dict_ema": state}, "openmmlab.pth": {"meta": {}, "state_dict": head},
        "nested.safetensors": None,
    }.items():  # fmt: skip
        if content:
            torch.save(content, tmp_path / name)
        weights, header = load_weights(tmp_path / name)
        assert header == {}
        assert weights.keys() == state.keys()
        assert torch.equal(weights["conv1.weight"], state["conv1.weight"])


def test_the_architecture_that_a_checkpoint_names_is_found(tmp_path: Path) -> None:
    """As in the checkpoints of PyTorch's ImageNet example and of timm."""
    torch.save({"arch": "resnet20", "state_dict": ARCHS["resnet20"]().state_dict()}, tmp_path / "model_best.pth.tar")
    assert load_model(tmp_path / "model_best.pth.tar", None, None)[1].arch == "resnet20"


def test_a_file_of_two_models_is_refused(tmp_path: Path) -> None:
    state = ARCHS["resnet20"]().state_dict()
    torch.save(state | {f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "two.pth")
    with pytest.raises(UserError, match=r"^\S+two\.pth: holds several models \(module\.conv1\.weight is there twice\); give"):
        load_weights(tmp_path / "two.pth")


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    state = {"a.weight": torch.tensor([0.1, 3e-6], dtype=torch.bfloat16), "a.count": torch.tensor(7)}
    torch.save({"state_dict": {f"_orig_mod.module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "model.pt")
    save_file(state, tmp_path / "model.safetensors")
    for name in ("model.pt", "model.safetensors"):
        weights, _ = load_weights(tmp_path / name)
        assert {name: tensor.dtype for name, tensor in weights.items()} == {"a.weight": torch.float32, "a.count": torch.int64}
        assert weights["a.weight"].tolist() == state["a.weight"].tolist()


def test_a_checkpoint_that_holds_itself_is_refused(tmp_path: Path) -> None:
    content: dict[str, object] = {}
    content["model"] = content
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(UserError, match=r"model\.pth: holds no state dict"):
        load_weights(tmp_path / "model.pth")


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.system, ("touch /tmp/cropfeed-was-here",)


@pytest.mark.parametrize("extra", [argparse.Namespace(lr=1), np.float64(76.1), np.int64(3), np.float32(0.5)])
def test_checkpoints_of_training_scripts_load(tmp_path: Path, extra: object) -> None:
    """timm and torchvision save their arguments, others metrics as NumPy numbers."""
    state = ARCHS["resnet20"](num_classes=3).state_dict()
    torch.save({"state_dict": state, "extra": extra}, tmp_path / "checkpoint.pth.tar")
    found, _ = load_weights(tmp_path / "checkpoint.pth.tar")
    assert set(found) == set(state)


def test_types_that_might_run_code_are_named(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "extra": Path("x")}, tmp_path / "checkpoint.pth")
    with pytest.raises(UserError, match=r"holds objects of pathlib\S*PosixPath"):
        load_weights(tmp_path / "checkpoint.pth")


def test_weights_can_be_read_by_others_if_the_umask_allows(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        save_weights(tmp_path / "model.safetensors", {"w": torch.zeros(1)}, {})
    finally:
        os.umask(before)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_unreadable_files_are_one_line_errors(tmp_path: Path) -> None:
    torch.save({"state_dict": Harmful()}, tmp_path / "harmful.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "junk.pth").write_bytes(b"junk")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    for name in ("harmful.pth", "list.pth", "junk.pth", "junk.safetensors", "absent.pth", "absent.safetensors"):
        with pytest.raises(UserError, match=rf"^[^\n]*{name}: [^\n]+; give [^\n]+$"):
            load_weights(tmp_path / name)
    assert not Path("/tmp/cropfeed-was-here").exists()
    assert ModelConfig.from_header({}) is None
    with pytest.raises(UserError, match="the header is damaged"):
        ModelConfig.from_header(CONFIG.header() | {"mean": '[[3], "AAAA"]'})
