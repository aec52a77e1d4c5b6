"""How images are prepared for a model: presets, published weight files, and the configs of timm and Hugging Face's transformers.

Each source gives some fields of `ModelConfig` ("changes"): image_size, eval_short, resizing, interpolation, mean, std.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from model.describe import meta_model
from model.make import PREFIX, bare_name, image_size_of, timm_cfg
from model.weights import ModelConfig
from pipeline.errors import UserError
from pipeline.pixels.normalize import TORCHVISION
from pipeline.spec import INTERPOLATIONS
from pipeline.store import files

PRESETS = ("torchvision-v1", "torchvision-v2", "timm", "none")

# The preprocessing of published weights: short side, crop, interpolation. Torchvision and timm put the first digits of a file's
# SHA-256 into its name; timm also has tags. The sources are torchvision/models/resnet.py (ResNet50_Weights and its kin: V1, with
# the files before it, and V2) and timm/models/resnet.py (default_cfgs, at the test size: mostly Wightman et al. 2021, "ResNet
# strikes back").
PUBLISHED = {
    name: sizes
    for sizes, names in {
        (256, 224, "bilinear"): "f37072fd 5c106cde b627a593 333f7ec4 0676ba61 19c8e357 63fe2227 5d3b4d8f 394f9c45 b121ed2d "
        ".tv_in1k",
        (232, 224, "bilinear"): "11ad3fa6 cd907fc2 f82ba261 .tv2_in1k",
        (224, 224, "bicubic"): "001a1197 resnet50.a1h_in1k",
        (288, 288, "bicubic"): "d63eafa0 b61bd467 46f8f793 82d47d71 14fe96d1 a2746f79 532a802a 1ba180c1 5ba5e060 d01e05b2 "
        "f39db8af 36d3f2aa cdcb52a9 6edb36c7 dc400468 2eee8a7a b4c6978f .a1_in1k .a1h_in1k .a2_in1k .b1k_in1k .b2k_in1k "
        ".c1_in1k .c2_in1k .d_in1k",
        (235, 224, "bicubic"): "40c531c8 a20cabb6 59cae1ef 1db14157 134d4688 .a3_in1k",
        (303, 288, "bicubic"): "43635321 a26f946b 85ebb6e5 86acaeed .bt_in1k .ra_in1k .ram_in1k",
        # github.com/akamaster/pytorch_resnet_cifar10
        (32, 32, "bilinear"): "12fca82f d509ac18 014dd654 4bfd9763 1d1ed7c2 f3b1deed",
    }.items()
    for name in names.split()
}
ASSUMED = "torchvision's V1 weights, as the file does not tell"  # the origin of preprocessing that is assumed

_MOST_OVERHEAD = 1_000_000  # bytes of a published file beyond its tensors: names, offsets, checksums
_PIL = {2: "bilinear", 3: "bicubic"}


def published_config(path: Path, arch: str) -> ModelConfig:
    """The config of a file that has none: as in PUBLISHED, by its name or else by its content, or as in torchvision's V1 weights.
    For a model of timm, that of timm's default_cfg."""
    known = next((name for name in PUBLISHED if name in path.name), "")
    origin = f"the file's name ({known.strip('.')})"
    if not known and arch.startswith(PREFIX):
        return ModelConfig(arch, [], **preset("timm", arch))
    if not known and _may_be_published(path, arch):
        known = files.sha256(str(path))[:8]
        origin = f"the file's content (SHA-256 {known}...)"
    if known not in PUBLISHED:
        return ModelConfig(arch, [], **(preset("torchvision-v1", arch) | {"origin": ASSUMED}))
    return ModelConfig(arch, [], **_short_side(*PUBLISHED[known]), origin=origin)


def _may_be_published(path: Path, arch: str) -> bool:
    """Whether a file has the size that published weights of this model have: float32, 1000 classes. Reading it takes time."""
    if image_size_of(arch) != 224:
        return False
    tensors = sum(tensor.nbytes for tensor in meta_model(arch).state_dict().values())
    return 0 <= path.stat().st_size - tensors <= _MOST_OVERHEAD


def preset(name: str, arch: str) -> dict[str, Any]:
    """The preprocessing of a preset in PRESETS, or of the .json file `name`, and its origin.

    `timm` is that of the model's weights in timm, `none` resizes to the model's size and scales pixels to 0..1.
    """
    if name.endswith(".json"):
        changes = config_of_json(Path(name), name)
        if changes is None:
            raise UserError(f"{name}: is no config.json of timm and no preprocessor_config.json of transformers")
        return changes
    if name == "timm":
        timm_name = arch if arch.startswith(PREFIX) else PREFIX + bare_name(arch)
        return of_timm(timm_cfg(timm_name), f"timm's default_cfg of {timm_name.removeprefix(PREFIX)}")
    size = image_size_of(arch)
    short, crop = (size, size) if size != 224 or name == "none" else (256 if name == "torchvision-v1" else 232, size)
    changes = _short_side(short, crop) | {"origin": f"the preset {name}"}
    return changes if name != "none" else changes | _normalization((0, 0, 0), (1, 1, 1))


def _short_side(short: int, crop: int, interpolation: str = "bilinear") -> dict[str, Any]:
    """Torchvision's transforms: Resize(short), CenterCrop(crop), Normalize for ImageNet."""
    sizes = {"image_size": crop, "eval_short": short, "interpolation": interpolation}
    return sizes | {"resizing": "torchvision", "mean": TORCHVISION.mean, "std": TORCHVISION.std}


def _normalization(mean: Any, std: Any) -> dict[str, Any]:
    """mean, std: three numbers each, for pixels in 0..1."""
    return {name: np.array(values, np.float32).reshape(3) * 255 for name, values in (("mean", mean), ("std", std))}


def crop_share(cfg: Mapping[str, Any]) -> float:
    """The share of the resized image's side that timm's validation crops."""
    return float(cfg.get("test_crop_pct") or cfg.get("crop_pct") or 0.875)


def of_timm(cfg: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The preprocessing of timm's validation: `test_input_size` and `test_crop_pct`, where they exist, else `input_size` and
    `crop_pct`; short side floor(size / crop_pct).

    cfg: a pretrained_cfg. Raises ValueError, TypeError or LookupError if it is damaged.
    """
    _, height, width = cfg.get("test_input_size") or cfg.get("input_size") or (3, 224, 224)
    share = crop_share(cfg)
    if height < 1 or height != width or not 0 < share <= 1:
        raise ValueError(f"a crop of {height} x {width} pixels, {share} of the image")
    given = cfg.get("interpolation") or "bicubic"
    interpolation = given if given in INTERPOLATIONS else "bicubic"
    mode = cfg.get("crop_mode") or "center"
    changes = _short_side(math.floor(height / share), int(height), interpolation)
    changes |= _normalization(cfg.get("mean") or TORCHVISION.mean / 255, cfg.get("std") or TORCHVISION.std / 255)
    if mode == "squash":
        changes["resizing"] = "square"
    elif mode != "center":
        origin += f", but with a central crop instead of {mode}"
    if interpolation != given:
        origin += f", but resized by {interpolation} instead of {given} interpolation"
    return changes | {"origin": origin}


def of_transformers(content: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The preprocessing in a preprocessor_config.json of Hugging Face's transformers.

    Raises ValueError, TypeError or LookupError if it is damaged.
    """
    given = content["size"], content.get("crop_size") or {}
    size, crop = ({"shortest_edge": one} if isinstance(one, int) else one for one in given)
    short = int(size.get("shortest_edge") or size["height"])
    side = int(crop.get("height") or crop.get("shortest_edge") or short) if content.get("do_center_crop", bool(crop)) else short
    resizing = "torchvision" if "shortest_edge" in size else "square"
    if share := content.get("crop_pct"):  # ConvNextImageProcessor: `size` is that of the crop, and from 384 on nothing is cropped
        side, resizing = short, "torchvision" if short < 384 else "square"
        short = int(side / float(share)) if short < 384 else side
    if not 0 < side <= short or content.get("do_resize") is False:
        raise ValueError(f"a crop of {side} pixels from a short side of {short}")
    changes = _short_side(short, side, _PIL.get(content.get("resample", 2), "bicubic")) | {"resizing": resizing, "origin": origin}
    if content.get("do_normalize") is False:
        return changes | _normalization((0, 0, 0), (1, 1, 1))
    return changes | _normalization(content["image_mean"], content["image_std"])


def config_of_json(path: Path, origin: str) -> dict[str, Any] | None:
    """The preprocessing in a config.json of timm or a preprocessor_config.json of transformers. None for other files, such as the
    config.json of a Cropfeed run. Raises UserError if it is damaged."""
    try:
        content = json.loads(path.read_text("utf-8"))
        if not isinstance(content, dict):
            return None
        if "architecture" in content:
            return of_timm(content.get("pretrained_cfg") or content, origin)  # before 0.9, timm had one level
        return of_transformers(content, origin) if "image_mean" in content else None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{path}: is damaged ({error})", "repair it, or move the weights to another folder") from error
