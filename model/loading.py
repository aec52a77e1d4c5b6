"""Nets from weight files: which net a file holds, and how it is fed.

A source is one of

- a file of ours (.safetensors, its recipe in the header), a run's folder, or a folder that tools/export.py wrote;
- torchvision's or anybody's .pth, .pt, .bin or .safetensors with torchvision's keys. The file's name tells the net
  (resnet50-0676ba61.pth, resnet18.a1_in1k.safetensors) where --arch does not; pictures get torchvision's preprocessing;
- a folder as timm writes it: config.json beside model.safetensors or pytorch_model.bin;
- hf://user/repo or hf://user/repo@revision: any of these on the Hugging Face Hub, or in its local cache.

Labels: torchvision's and timm's ImageNet nets number the classes by their sorted synset names (n01440764 is 0), as our shards do.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from model.describe import meta_model
from model.resnet import ARCHS, ResNet
from model.weights import ModelConfig, load_weights
from pipeline.errors import UserError
from pipeline.pixels.normalize import TORCHVISION

Weights = dict[str, torch.Tensor]

_HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # the names of weights beside a config.json


def weights_file(source: str | Path) -> Path:
    """The file of weights that `source` names. Raises UserError where there is none; see the module for what a source may be."""
    text = str(source)
    path = _hub_folder(text) if text.startswith("hf:/") else Path(source)
    if path.is_file():
        return path
    for name in ("model.safetensors", "checkpoints/last/model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return path / name
    raise UserError(f"{source}: no weights there; give a run's or timm's folder, hf://user/repo, a .safetensors or .pth file")


def load_model(source: str | Path, arch: str | None, classes: list[str] | None) -> tuple[ResNet, ModelConfig]:
    """The net in a file of weights and how to feed it.

    arch: its name in ARCHS, where the file does not tell. classes: the data's, in label order; the file must have been trained
    on them. A file that names no classes is taken to be if their number is right. None: whatever classes the file has.
    Raises UserError where something does not fit.
    """
    path = weights_file(source)
    weights, header = load_weights(path)
    arch, recipe = _told(path, header, arch)
    outputs = _outputs(weights)
    net = ARCHS[arch](**({"num_classes": outputs} if outputs else {}))
    _fit(net, weights, path, arch)
    if recipe is None:
        short = 256 if net.image_size == 224 else net.image_size  # CIFAR's pictures are taken whole
        recipe = ModelConfig(arch, [], net.image_size, short, TORCHVISION.mean, TORCHVISION.std)
    if recipe.classes and len(recipe.classes) != outputs:
        raise UserError(f"{path}: names {len(recipe.classes)} classes and has {outputs} outputs; give a file that is not damaged")
    if classes is None:
        return net, recipe
    if outputs != len(classes) or recipe.classes not in ([], classes):
        raise UserError(
            f"{path}: was trained on {outputs} classes, the data has {len(classes)} (or others); give the data it belongs to"
        )
    return net, replace(recipe, classes=classes)


def initial_weights(source: str | Path, arch: str, net: ResNet, classes: list[str]) -> str:
    """Fill `net`, an `arch` for these classes, with a file's weights, to fine-tune it; returns a line that says what was taken.

    The classifier keeps the weights it has, and so starts anew, if the file's has another number of outputs, belongs to classes
    of other names, or is missing. All else must fit, or a UserError is raised.
    """
    path = weights_file(source)
    weights, header = load_weights(path)
    _, recipe = _told(path, header, arch)
    outputs, names = _outputs(weights), recipe.classes if recipe else []
    if outputs == len(classes) and names in ([], classes):
        _fit(net, weights, path, arch)
        return f"{path}: starting from its {arch}, classifier included"
    why = f"the file's is for {outputs} {'other ' if outputs == len(classes) else ''}classes" if outputs else "the file has none"
    own = {"fc.weight": net.fc.weight.detach().clone(), "fc.bias": net.fc.bias.detach().clone()}
    _fit(net, weights, path, arch, own)
    return f"{path}: starting from its {arch}; the classifier of {len(classes)} classes starts anew, as {why}"


def arch_of_name(name: str) -> str | None:
    """The net that a file's name begins with, followed by its end or by neither a letter nor a digit; the longest one."""
    found = [arch for arch in ARCHS if name == arch or (name.startswith(arch) and not name[len(arch)].isalnum())]
    return max(found, key=len, default=None)


def _told(path: Path, header: dict[str, str], arch: str | None) -> tuple[str, ModelConfig | None]:
    """The net in a file, by its header, the config.json beside it, `arch` or its name; and the recipe where there is one."""
    if arch is not None and arch not in ARCHS:
        raise UserError(f"unknown --arch {arch!r}; choose from {', '.join(ARCHS)}")
    try:
        recipe = ModelConfig.from_header(header) or _timm_recipe(path)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if recipe is None:
        arch = arch or arch_of_name(path.name)
        if arch is None:
            raise UserError(f"{path}: does not say which net it holds; give --arch")
        return arch, None
    if recipe.arch not in ARCHS:
        raise UserError(f"{path}: holds a {recipe.arch}, which is not a net of the paper; give one of {', '.join(ARCHS)}")
    if arch not in (None, recipe.arch):
        raise UserError(f"{path}: holds a {recipe.arch}, not --arch {arch}")
    return recipe.arch, recipe


def _timm_recipe(path: Path) -> ModelConfig | None:
    """What the config.json of a timm folder tells, None where there is none.

    Pictures are fed as timm evaluates at its training size: `input_size` (not `test_input_size`), short side
    floor(size / crop_pct), mean and std times 255. Bilinear where timm's may be bicubic.
    """
    file = path.with_name("config.json")
    if path.name not in _HUB_FILES or not file.is_file():
        return None
    try:
        config = json.loads(file.read_text())
        if not isinstance(config, dict) or "architecture" not in config:  # a run of ours has a config.json, too
            return None
        feed = config.get("pretrained_cfg") or config  # files of timm before 0.9 have its entries at the top
        size = int(feed.get("input_size", (3, 224, 224))[1])
        mean, std = (
            np.array(feed.get(name, usual / 255), np.float32).reshape(3) * 255
            for name, usual in (("mean", TORCHVISION.mean), ("std", TORCHVISION.std))
        )
        short = math.floor(size / float(feed.get("crop_pct", 0.875)))
        names = [str(name) for name in config.get("label_names") or feed.get("label_names") or []]
        if config.get("model_args"):
            raise UserError(f"holds a {config['architecture']} with model_args, not a net of the paper; give a plain one")
        return ModelConfig(str(config["architecture"]).partition(".")[0], names, size, short, mean, std)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise UserError(f"its config.json is damaged ({error}); mend it, or take the weights away from it") from error


def _outputs(weights: Weights) -> int:
    """How many classes the classifier in a state dict has, 0 where there is none."""
    classifier = weights.get("fc.weight")
    return len(classifier) if classifier is not None and classifier.ndim == 2 else 0


def _fit(net: ResNet, weights: Weights, path: Path, arch: str, classifier: Weights | None = None) -> None:
    """Load a state dict into a net, if it is just of that net, with `classifier` in place of its own.

    BN's counts of batches, absent in old files, become 0.
    """
    expected = net.state_dict()
    layers = [name.removesuffix(".running_mean") for name in weights if name.endswith(".running_mean")]
    weights = {f"{layer}.num_batches_tracked": torch.tensor(0) for layer in layers} | weights
    fitted = weights | (classifier or {})
    difference = _difference(expected, fitted)
    if difference:
        raise UserError(f"{path}: holds no {arch} ({difference}); {_remedy(weights)}")
    net.load_state_dict(fitted)


def _difference(expected: Weights, weights: Weights) -> str | None:
    """The first key or shape that differs, in words."""
    extra = next((name for name in weights if name not in expected), None)
    for name, tensor in expected.items():
        if name not in weights:
            return f"no {name}" + (f", but {extra}" if extra else "")
        if weights[name].shape != tensor.shape:
            return f"{name} is {tuple(weights[name].shape)}, not {tuple(tensor.shape)}"
    return f"{extra} too many" if extra else None


def _remedy(weights: Weights) -> str:
    """What to do about weights that did not fit."""
    if any("embedder." in name for name in weights):
        return "its keys are those of Hugging Face's transformers: give a file with torchvision's or timm's"
    outputs = _outputs(weights)
    fitting = []
    for arch in (name for name in ARCHS if not name.endswith("_blur")):  # their weights are the others'
        net = meta_model(arch, **({"num_classes": outputs} if outputs else {}))
        if _difference(net.state_dict(), weights) is None:
            fitting.append(arch)
    if fitting:
        return f"it fits --arch {' or '.join(fitting)}"
    return "it is not a net of the paper, or not with torchvision's keys: give one of " + ", ".join(ARCHS)


def _hub_folder(source: str) -> Path:
    """The local folder of hf://user/repo[@revision], downloaded or from the cache: its config.json and one file of weights.

    A pathlib.Path makes one slash of the two behind "hf:"; both are understood.
    """
    match = re.fullmatch(r"hf://?([^/@]+/[^/@]+)(?:@(.+))?", source)
    if not match:
        raise UserError(f"{source}: is no repository of the Hugging Face Hub; give hf://user/repo or hf://user/repo@revision")
    try:
        from huggingface_hub import snapshot_download

        def get(*names: str) -> Path:
            return Path(snapshot_download(match[1], revision=match[2], allow_patterns=list(names)))

        folder = get("config.json", "model.safetensors")
        return folder if (folder / "model.safetensors").is_file() else get("config.json", "pytorch_model.bin")
    except ImportError as error:
        raise UserError(f"{source}: needs huggingface_hub: pip install -e '.[export]'") from error
    except Exception as error:  # of the network, the server, the cache, the name
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{source}: cannot be had ({why}); check its name, the network, and HF_TOKEN if it is private") from error
