"""Models by name. A stand-in for timm shows what is asked of it. With timm itself: tests/tools/bench/test_timm_logits.py."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from model.card import timm_config
from model.loading import initial_weights, load_model
from model.make import check_arch, has_one_size, image_size_of, make_model, timm_cfg
from model.preprocessing import preset
from model.weights import ModelConfig, save_weights
from pipeline.errors import UserError
from tools import profile_pipeline
from training.options import TrainOptions

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Tiny(nn.Module):
    """A model with timm's attributes. Its last layer is `head`."""

    def __init__(self, num_classes: int, side: int) -> None:
        super().__init__()
        self.num_classes, self.num_features, self.side = num_classes, 8, side
        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, num_classes)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.stem(x).mean((2, 3)))


@dataclass(frozen=True)
class Cfg:
    """The fields of timm's PretrainedCfg that are used."""

    input_size: tuple[int, int, int] = (3, 48, 48)
    test_input_size: tuple[int, int, int] | None = (3, 60, 60)
    fixed_input_size: bool = False
    interpolation: str = "bilinear"
    crop_pct: float = 0.9
    test_crop_pct: float | None = 1.0
    crop_mode: str = "center"
    mean: tuple[float, ...] = (0.5, 0.4, 0.3)
    std: tuple[float, ...] = (0.2, 0.25, 0.5)
    first_conv: str = "stem"
    classifier: str = "head"

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Cfg]]:
    """A stand-in for timm, with the cfg of each model."""
    cfgs = {
        "tiny": Cfg(),
        "tiny_fixed": Cfg(fixed_input_size=True, test_input_size=None, test_crop_pct=None),
        "wide": Cfg((3, 9, 8)),
    }
    module: Any = ModuleType("timm")

    def create_model(name: str, num_classes: int = 5, img_size: int = 48) -> Tiny:
        assert name.partition(".")[0] in cfgs
        return Tiny(num_classes, img_size)

    def get_pretrained_cfg(name: str) -> Cfg:
        base, _, tag = name.partition(".")
        if tag not in ("", "tv_in1k"):
            raise RuntimeError(f"Invalid pretrained tag ({tag}) for {base}.")
        return replace(cfgs[base], mean=IMAGENET[0], std=IMAGENET[1]) if tag else cfgs[base]

    module.__version__, module.create_model, module.get_pretrained_cfg = "1.2.3", create_model, get_pretrained_cfg
    module.is_model, module.list_models = cfgs.__contains__, lambda: list(cfgs)
    module.list_pretrained = lambda pattern: [f"{pattern.removesuffix('.*')}.tv_in1k"]
    monkeypatch.setitem(sys.modules, "timm", module)
    timm_cfg.cache_clear()
    yield cfgs
    timm_cfg.cache_clear()


def test_models_of_timm_are_made_with_the_classes_and_size_that_are_asked_for(timm: dict[str, Cfg]) -> None:
    for arch, classes, size, side in (
        ("timm/tiny", None, None, 48),
        ("timm/tiny.tv_in1k", 7, 96, 48),  # a convolutional model is the same for any size
        ("timm/tiny_fixed", 7, 96, 96),
        ("timm/tiny_fixed", 7, 48, 48),
    ):
        model = make_model(arch, classes, image_size=size)
        assert isinstance(model, Tiny)
        assert (model.num_classes, model.side) == (classes or 5, side)
    assert (image_size_of("timm/tiny"), image_size_of("resnet20"), image_size_of("resnet50")) == (48, 32, 224)
    assert [has_one_size(arch) for arch in ("timm/tiny", "timm/tiny_fixed", "resnet18")] == [False, True, False]


def test_names_that_timm_does_not_know_are_refused_in_one_line(timm: dict[str, Cfg]) -> None:
    for arch, words in (
        ("timm/tini", "`arch` timm/tini: timm 1.2.3 has no such model; choose from tiny, tiny_fixed, ..."),
        ("timm/tiny.a1", "`arch` timm/tiny.a1: timm knows no such weights; choose from the tags tv_in1k"),
        ("timm/wide", "`arch` timm/wide takes 3 x 9 x 8 images, not square ones in RGB; choose another"),
        ("timm/hf-hub:user/repo", "`arch` timm/hf-hub:user/repo: timm 1.2.3 has no such model; choose from "),
    ):
        with pytest.raises(UserError) as caught:
            check_arch(arch)
        assert str(caught.value).startswith(words)
        assert "\n" not in str(caught.value)


def test_without_timm_an_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    timm_cfg.cache_clear()
    with pytest.raises(
        UserError, match=r"^`arch` timm/tiny needs timm, which cannot be imported \(.+\); pip install -e '\.\[timm\]'$"
    ):
        TrainOptions(data="x", arch="timm/tiny")


def test_timms_default_cfg_gives_the_preprocessing(timm: dict[str, Cfg]) -> None:
    found = ModelConfig("timm/tiny", [], **preset("timm", "timm/tiny"))
    assert found.preprocessing == (
        "short side 60, crop 60, mean (127.5, 102, 76.5), std (51, 63.75, 127.5), from timm's default_cfg of tiny"
    )
    fixed = preset("timm", "timm/tiny_fixed")
    assert (fixed["image_size"], fixed["eval_short"], fixed["resizing"]) == (48, 53, "torchvision")  # floor(48 / 0.9)
    timm["tiny"] = replace(timm["tiny"], crop_mode="squash", interpolation="bicubic")
    timm_cfg.cache_clear()
    squashed = ModelConfig("timm/tiny", [], **preset("timm", "timm/tiny"))
    assert squashed.preprocessing.startswith("both sides 60 (bicubic), crop 60, mean")


def test_training_takes_size_and_normalization_from_timm_where_none_are_given(timm: dict[str, Cfg]) -> None:
    options = TrainOptions(data="x", arch="timm/tiny")
    assert (options.image_size, options.mean) == (48, "model")
    options = TrainOptions(data="x", arch="timm/tiny", image_size=32, mean="channel")
    assert (options.image_size, options.mean) == (32, "channel")
    assert (TrainOptions(data="x").image_size, TrainOptions(data="x").mean) == (224, "pixel")
    for wrong, words in (
        ({"arch": "timm/tiny_fixed", "start_size": 32}, "takes images of one size only"),
        ({"arch": "timm/tiny_fixed", "eval_size": 64}, "takes images of one size only"),
        ({"arch": "timm/tiny", "drop_path": 0.1}, "`drop_path`: timm/tiny cannot resume"),
        ({"arch": "timm/tiny", "blurpool": True}, "there is no timm/tiny_blur"),
    ):
        with pytest.raises(UserError, match=words):
            TrainOptions(data="x", **wrong)  # type: ignore[arg-type]


def test_weights_of_timms_models_load_with_their_own_classifier(timm: dict[str, Cfg], tmp_path: Path) -> None:
    torch.manual_seed(0)
    trained, classes = Tiny(3, 48), ["a", "b", "c"]
    config = ModelConfig("timm/tiny", classes, 48, 53, np.ones(3, np.float32), np.ones(3, np.float32), interpolation="bicubic")
    save_weights(tmp_path / "model.safetensors", trained.state_dict(), config.header())
    model, found = load_model(tmp_path / "model.safetensors", None, classes)
    x = torch.randn(2, 3, 48, 48)
    assert torch.equal(model(x), trained(x))
    assert (found.arch, found.interpolation, found.resizing, found.eval_short) == ("timm/tiny", "bicubic", "short", 53)

    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in trained.state_dict().items()}}, tmp_path / "x.pth")
    model, found = load_model(tmp_path / "x.pth", "timm/tiny", None)
    assert torch.equal(model(x), trained(x))
    assert found.preprocessing.endswith("from timm's default_cfg of tiny")
    new = Tiny(4, 48)
    before = new.head.weight.detach().clone()
    assert "initialized anew for 4 classes" in initial_weights(tmp_path / "x.pth", "timm/tiny", new, ["a", "b", "c", "d"])
    assert torch.equal(new.stem.weight, trained.stem.weight)
    assert torch.equal(new.head.weight, before)
    content = timm_config(model, found)
    assert (content["architecture"], content["num_classes"]) == ("tiny", 3)
    assert content["pretrained_cfg"]["classifier"] == "head"
    with pytest.raises(UserError, match=r"holds a timm/tiny, but `arch` is timm/tiny_fixed"):
        load_model(tmp_path / "model.safetensors", "timm/tiny_fixed", None)


def test_the_profiler_resizes_as_the_training_does(timm: dict[str, Cfg]) -> None:
    timm["tiny"] = Cfg(interpolation="bicubic")
    arguments = ["shards", "--arch", "timm/tiny"]
    assert profile_pipeline.parse(arguments).options.spec.interpolation == "bicubic"
    assert profile_pipeline.parse([*arguments, "--interpolation", "bilinear"]).options.spec.interpolation == "bilinear"
    assert profile_pipeline.parse(["shards"]).options.spec.interpolation == "bilinear"
