"""Models from weight files: identifies the architecture, loads the weights, finds the preprocessing.

A source is one of

- a file that Cropfeed wrote (.safetensors with the model's config in its header), a run's folder, or a folder that
  tools/export.py wrote;
- any .pth, .pt, .bin or .safetensors file with torchvision's keys. The architecture is `arch` or, if that is None, taken from
  the file's name (resnet50-0676ba61.pth, resnet18.a1_in1k.safetensors). The published files of torchvision and timm are
  recognized, see `PUBLISHED`. For others, the preprocessing of torchvision's V1 weights is assumed;
- a folder in timm's format: config.json with model.safetensors or pytorch_model.bin;
- hf://user/repo or hf://user/repo@revision: any of these on the Hugging Face Hub, or in its local cache.

Labels: the ImageNet models of torchvision and timm number the classes by sorted synset IDs (n01440764 is 0), as shards do.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from model.checkpoints import run_weights
from model.describe import meta_model
from model.resnet import ARCHS, ResNet
from model.weights import ModelConfig, load_weights
from pipeline.errors import UserError
from pipeline.pixels.normalize import TORCHVISION
from pipeline.store import files

Weights = dict[str, torch.Tensor]

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
    }.items()
    for name in names.split()
}
ASSUMED = "torchvision's V1 weights, as the file does not tell"  # the origin of preprocessing that is assumed

_HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # names of weight files with a config.json beside them


def weights_file(source: str | Path) -> Path:
    """The weight file of a source (see the module's docstring). Raises UserError if there is none."""
    text = str(source)
    path = _hub_folder(text) if text.startswith("hf:/") else Path(source)
    if path.is_file():
        return path
    if found := run_weights(path):
        return found
    if (path / "pytorch_model.bin").is_file():
        return path / "pytorch_model.bin"
    raise UserError(
        f"{source}: contains no weights",
        "give a run's folder, a folder in timm's format, hf://user/repo, a .safetensors or a .pth file",
    )


def load_model(source: str | Path, arch: str | None, classes: list[str] | None) -> tuple[ResNet, ModelConfig]:
    """The model in a weight file, and its config.

    arch: its name in ARCHS; needed if the file does not tell. classes: the classes of the data, in label order. The model must
    have been trained on the same classes; if the file does not name its classes, their number must match. None accepts any
    classes. Raises UserError for a mismatch.
    """
    path = weights_file(source)
    weights, header = load_weights(path)
    arch, config = _identify(path, header, arch)
    outputs = _outputs(weights)
    model = ARCHS[arch](**({"num_classes": outputs} if outputs else {}))
    _load_state(model, weights, path, arch)
    if config is None:
        config = published_config(path, arch, model.image_size)
    if config.classes and len(config.classes) != outputs:
        raise UserError(f"{path}: names {len(config.classes)} classes, but has {outputs} outputs", "give an undamaged file")
    if classes is None:
        return model, config
    if outputs != len(classes) or config.classes not in ([], classes):
        differs = f": {first_difference(config.classes, classes)}" if config.classes else ""
        problem = f"{path}: its {outputs} classes differ from the {len(classes)} of the data{differs}"
        raise UserError(problem, "give the data that it was trained on")
    return model, replace(config, classes=classes)


def initial_weights(source: str | Path, arch: str, model: ResNet, classes: list[str]) -> str:
    """Load a file's weights into `model`, to fine-tune it on these classes. Returns one line that says what was loaded.

    arch: the model's name in ARCHS. The model keeps its newly initialized classifier if the file's classifier is missing, has
    another number of outputs, or belongs to other class names. Raises UserError if anything else does not match.
    """
    path = weights_file(source)
    weights, header = load_weights(path)
    _, config = _identify(path, header, arch)
    outputs, names = _outputs(weights), config.classes if config else []
    if outputs == len(classes) and names in ([], classes):
        _load_state(model, weights, path, arch)
        return f"{path}: training starts from these {arch} weights, including the classifier"
    why = f"the file's is for {outputs} {'other ' if outputs == len(classes) else ''}classes" if outputs else "the file has none"
    new = {"fc.weight": model.fc.weight.detach().clone(), "fc.bias": model.fc.bias.detach().clone()}
    _load_state(model, weights, path, arch, new)
    if names and outputs:
        why += f" ({first_difference(names, classes)})"
    return (
        f"{path}: training starts from these {arch} weights, except for the classifier: "
        f"it is initialized anew for {len(classes)} classes, because {why}"
    )


def first_difference(classes: list[str], data: list[str]) -> str:
    """The first class of a model that is not the one with its number in the data; the lists differ."""
    for index, (own, other) in enumerate(itertools.zip_longest(classes, data)):
        if own != other:
            own, other = (repr(name) if name is not None else "missing" for name in (own, other))
            return f"class {index} is {own}, in the data {other}"
    return "no class"


def arch_of_name(name: str) -> str | None:
    """The longest architecture name that a file's name starts with. The next character must not be a letter or a digit."""
    found = [arch for arch in ARCHS if name == arch or (name.startswith(arch) and not name[len(arch)].isalnum())]
    return max(found, key=len, default=None)


def _identify(path: Path, header: dict[str, str], arch: str | None) -> tuple[str, ModelConfig | None]:
    """A file's architecture (from its header, its config.json, `arch` or its name), and its config, if it has one."""
    if arch is not None and arch not in ARCHS:
        raise UserError(f"unknown `arch` {arch!r}", f"choose from {', '.join(ARCHS)}")
    try:
        config = ModelConfig.from_header(header) or _timm_config(path)
    except UserError as error:
        raise UserError(f"{path}: {error.problem}", error.remedy) from error
    if config is None:
        arch = arch or arch_of_name(path.name)
        if arch is None:
            raise UserError(f"{path}: does not say which model it holds", "give `arch`")
        return arch, None
    if config.arch not in ARCHS:
        raise UserError(f"{path}: holds a {config.arch}, which is not supported", f"give one of {', '.join(ARCHS)}")
    if arch not in (None, config.arch):
        raise UserError(f"{path}: holds a {config.arch}, but `arch` is {arch}")
    return config.arch, config


def published_config(path: Path, arch: str, size: int) -> ModelConfig:
    """The config of a file that has none: as in PUBLISHED, by its name or else by its content, or as in torchvision's V1 weights.

    size: of the images that the model is designed for.
    """
    known = next((name for name in PUBLISHED if name in path.name), "")
    origin = f"the file's name ({known.strip('.')})"
    if not known:
        known = files.sha256(str(path))[:8]
        origin = f"the file's content (SHA-256 {known}...)"
    short, crop, interpolation = PUBLISHED.get(known, (256, 224, "bilinear"))
    if size != 224:  # CIFAR's images are not cropped
        short = crop = size
    origin = origin + _bilinear_instead_of(interpolation) if known in PUBLISHED and size == 224 else ASSUMED
    return ModelConfig(arch, [], crop, short, TORCHVISION.mean, TORCHVISION.std, origin=origin)


def _bilinear_instead_of(interpolation: str) -> str:
    return "" if interpolation == "bilinear" else f", but resized by bilinear instead of {interpolation} interpolation"


def _timm_config(path: Path) -> ModelConfig | None:
    """The config in the config.json of a folder in timm's format; None if there is none.

    Preprocessing is that of timm's validation: `test_input_size` and `test_crop_pct`, where they exist, else `input_size` and
    `crop_pct`; short side floor(size / crop_pct), mean and std times 255. Resizing is bilinear, while timm's may be bicubic.
    """
    file = path.with_name("config.json")
    if path.name not in _HUB_FILES or not file.is_file():
        return None
    try:
        content = json.loads(file.read_text("utf-8"))
        if not isinstance(content, dict) or "architecture" not in content:  # a Cropfeed run has a config.json, too
            return None
        preprocessing = content.get("pretrained_cfg") or content  # timm before 0.9 has its entries at the top level
        size = int((preprocessing.get("test_input_size") or preprocessing.get("input_size") or (3, 224, 224))[1])
        share = float(preprocessing.get("test_crop_pct") or preprocessing.get("crop_pct") or 0.875)
        if size < 1 or not 0 < share <= 1:
            raise ValueError(f"a crop of {size} pixels, {share} of the short side")
        mean, std = (
            np.array(preprocessing.get(name) or default / 255, np.float32).reshape(3) * 255
            for name, default in (("mean", TORCHVISION.mean), ("std", TORCHVISION.std))
        )
        origin = "its config.json" + _bilinear_instead_of(preprocessing.get("interpolation") or "bicubic")
        if (mode := preprocessing.get("crop_mode") or "center") != "center":
            origin += f", and with a central crop instead of {mode}"
        names = [str(name) for name in content.get("label_names") or preprocessing.get("label_names") or []]
        if content.get("model_args"):
            raise UserError(
                f"holds a {content['architecture']} with model_args, which are not supported", "give a model without model_args"
            )
        arch = str(content["architecture"]).partition(".")[0]
        return ModelConfig(arch, names, size, math.floor(size / share), mean, std, origin=origin)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise UserError(f"its config.json is damaged ({error})", "repair it, or move the weights to another folder") from error


def _outputs(weights: Weights) -> int:
    """The number of classes of a state dict's classifier, 0 if it has none."""
    classifier = weights.get("fc.weight")
    return len(classifier) if classifier is not None and classifier.ndim == 2 else 0


def _load_state(model: ResNet, weights: Weights, path: Path, arch: str, classifier: Weights | None = None) -> None:
    """Load a state dict into a model, after checking that keys and shapes match. classifier: replaces the file's classifier.

    The batch counters of BN, which old files lack, become 0.
    """
    layers = [name.removesuffix(".running_mean") for name in weights if name.endswith(".running_mean")]
    weights = {f"{layer}.num_batches_tracked": torch.tensor(0) for layer in layers} | weights
    state = weights | (classifier or {})
    mismatch = _mismatch(model.state_dict(), state)
    if mismatch:
        raise UserError(f"{path}: does not fit {arch} ({mismatch})", _remedy(weights))
    model.load_state_dict(state)


def _mismatch(expected: Weights, weights: Weights) -> str | None:
    """A description of the first key or shape that differs."""
    extra = next((name for name in weights if name not in expected), None)
    for name, tensor in expected.items():
        if name not in weights:
            return f"no {name}" + (f", but {extra}" if extra else "")
        if weights[name].shape != tensor.shape:
            return f"{name} is {tuple(weights[name].shape)}, not {tuple(tensor.shape)}"
    return f"unexpected {extra}" if extra else None


def _remedy(weights: Weights) -> str:
    """What to do about weights that do not match."""
    if any("embedder." in name for name in weights):
        return "its keys are those of Hugging Face's transformers: give a file with torchvision's or timm's"
    outputs = _outputs(weights)
    fitting = []
    for arch in (name for name in ARCHS if not name.endswith("_blur")):  # the same weights as without blur
        model = meta_model(arch, **({"num_classes": outputs} if outputs else {}))
        if _mismatch(model.state_dict(), weights) is None:
            fitting.append(arch)
    if fitting:
        return f"it fits `arch` {' or '.join(fitting)}"
    return "its model is not supported, or its keys are not torchvision's; supported models: " + ", ".join(ARCHS)


def _hub_folder(source: str) -> Path:
    """The local folder of hf://user/repo[@revision], downloaded or from the cache: its config.json and one weight file.

    pathlib.Path turns the two slashes after "hf:" into one; both forms are accepted.
    """
    match = re.fullmatch(r"hf://?([^/@]+/[^/@]+)(?:@(.+))?", source)
    if not match:
        raise UserError(
            f"{source}: is not a repository of the Hugging Face Hub", "give hf://user/repo or hf://user/repo@revision"
        )
    try:
        from huggingface_hub import snapshot_download

        def get(*names: str) -> Path:
            return Path(snapshot_download(match[1], revision=match[2], allow_patterns=list(names)))

        folder = get("config.json", "model.safetensors")
        return folder if (folder / "model.safetensors").is_file() else get("config.json", "pytorch_model.bin")
    except ImportError as error:
        raise UserError(f"{source}: needs huggingface_hub", "pip install -e '.[export]'") from error
    except Exception as error:  # from the network, the server, the cache, the name
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{source}: cannot be downloaded ({why})", "check its name, the network, and HF_TOKEN if it is private"
        ) from error
