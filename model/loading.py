"""Models from weight files: identifies the architecture, loads the weights, finds the preprocessing.

A source is one of

- a file that Cropfeed wrote (.safetensors with the model's config in its header), a run's folder, or a folder that
  tools/export.py wrote;
- any .pth, .pt, .th, .bin, .pth.tar or .safetensors file with the keys of torchvision or timm. The architecture is `arch` or, if
  that is None, taken from the checkpoint or the file's name (resnet50-0676ba61.pth, resnet18.a1_in1k.safetensors). The published
  files of torchvision and timm are recognized, see `model.preprocessing`. For others, the preprocessing of torchvision's V1
  weights is assumed;
- a folder in timm's format: config.json with model.safetensors or pytorch_model.bin;
- hf://user/repo or hf://user/repo@revision: any of these on the Hugging Face Hub, or in its local cache.

Labels: the ImageNet models of torchvision and timm number the classes by sorted synset IDs (n01440764 is 0), as shards do.
"""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from model.checkpoints import run_weights
from model.describe import meta_model
from model.make import PREFIX, bare_name, check_arch, classifiers_of, make_model
from model.preprocessing import config_of_json, published_config
from model.resnet import ARCHS
from model.weights import ModelConfig, load_weights, padded_on_both_sides
from pipeline.errors import UserError

Weights = dict[str, torch.Tensor]

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


def load_model(source: str | Path, arch: str | None, classes: list[str] | None) -> tuple[nn.Module, ModelConfig]:
    """The model in a weight file, and its config.

    arch: a name for `make_model`; needed if the file does not tell. classes: the classes of the data, in label order. The model
    must have been trained on the same classes; if the file does not name its classes, their number must match. None accepts any
    classes. Raises UserError for a mismatch.
    """
    path = weights_file(source)
    weights, arch, config = _read(path, arch)
    outputs = _outputs(weights, arch)
    model = make_model(arch, outputs, image_size=config.image_size if config else None)
    _load_state(model, weights, path, arch)
    config = config or _config_of(path, arch)
    if config.classes and len(config.classes) != outputs:
        raise UserError(f"{path}: names {len(config.classes)} classes, but has {outputs} outputs", "give an undamaged file")
    if classes is None:
        return model, config
    if outputs != len(classes) or config.classes not in ([], classes):
        differs = f": {first_difference(config.classes, classes)}" if config.classes else ""
        problem = f"{path}: its {outputs} classes differ from the {len(classes)} of the data{differs}"
        raise UserError(problem, "give the data that it was trained on")
    return model, replace(config, classes=classes)


def initial_weights(source: str | Path, arch: str, model: nn.Module, classes: list[str]) -> str:
    """Load a file's weights into `model`, to fine-tune it on these classes. Returns one line that says what was loaded.

    arch: the model's name. The model keeps its newly initialized classifier if the file's classifier is missing, has another
    number of outputs, or belongs to other class names. Raises UserError if anything else does not match.
    """
    path = weights_file(source)
    weights, _, config = _read(path, arch)
    outputs, names = _outputs(weights, arch), config.classes if config else []
    if outputs == len(classes) and names in ([], classes):
        _load_state(model, weights, path, arch)
        return f"{path}: training starts from these {arch} weights, including the classifier"
    why = f"the file's is for {outputs} {'other ' if outputs == len(classes) else ''}classes" if outputs else "the file has none"
    layers = tuple(f"{layer}." for layer in classifiers_of(arch))
    new = {name: tensor.detach().clone() for name, tensor in model.state_dict().items() if name.startswith(layers)}
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


def _read(path: Path, arch: str | None) -> tuple[Weights, str, ModelConfig | None]:
    """A file's weights, its architecture and its config, if it has one. Weights of version 0.1 are made those of this one."""
    weights, header = load_weights(path)
    found, config = _identify(path, header, arch)
    if config and config.pads_at_end:
        weights, config = padded_on_both_sides(weights), replace(config, pads_at_end=False)
    names = {name: f"fc.{name.removeprefix('linear.')}" for name in weights if name.startswith("linear.")}
    if found in ARCHS and names:  # the usual implementations for CIFAR
        weights = {names.get(name, name): tensor for name, tensor in weights.items()}
    return weights, found, config


def _identify(path: Path, header: dict[str, str], arch: str | None) -> tuple[str, ModelConfig | None]:
    """A file's architecture (from its header, config.json, `arch`, the checkpoint or the name), and its config, if it has one."""
    if arch is not None:
        check_arch(arch)
    try:
        config = ModelConfig.from_header(header) or _config_beside(path)
    except UserError as error:
        raise UserError(f"{path}: {error.problem}", error.remedy) from error
    if config is None:
        arch = arch or _arch_of_checkpoint(header) or arch_of_name(path.name)
        if arch is None:
            raise UserError(f"{path}: does not say which model it holds", "give `arch`")
        return arch, None
    if arch is None:
        try:
            check_arch(config.arch)
        except UserError as error:
            problem = error.problem.replace("unknown `arch`", "unknown architecture").replace("`arch` ", "")
            raise UserError(f"{path}: holds a {bare_name(config.arch)}: {problem}", error.remedy) from error
        return config.arch, config
    if bare_name(arch) != bare_name(config.arch):
        raise UserError(f"{path}: holds a {config.arch}, but `arch` is {arch}")
    return arch, replace(config, arch=arch)


def _arch_of_checkpoint(header: dict[str, str]) -> str | None:
    """The architecture that a checkpoint of another training script names, if there is such a model."""
    name = header.get("checkpoint_arch", "")
    return name if name in ARCHS else None


def _config_beside(path: Path) -> ModelConfig | None:
    """The config in the config.json of a folder in timm's format; None if there is none."""
    file = path.with_name("config.json")
    if path.name not in _HUB_FILES or not file.is_file():
        return None
    changes = config_of_json(file, "its config.json")
    if changes is None:  # a Cropfeed run has a config.json, too
        return None
    content = json.loads(file.read_text("utf-8"))
    if "architecture" not in content:
        return None
    if content.get("model_args"):
        raise UserError(
            f"holds a {content['architecture']} with model_args, which are not supported", "give a model without model_args"
        )
    names = content.get("label_names") or (content.get("pretrained_cfg") or {}).get("label_names") or []
    arch = bare_name(str(content["architecture"]))
    return ModelConfig(arch if arch in ARCHS else PREFIX + arch, [str(name) for name in names], **changes)


def _config_of(path: Path, arch: str) -> ModelConfig:
    """The config of a file that names no architecture: from transformers' preprocessor_config.json, or `published_config`."""
    file = path.with_name("preprocessor_config.json")
    changes = config_of_json(file, f"its {file.name}") if path.name in _HUB_FILES and file.is_file() else None
    return ModelConfig(arch, [], **changes) if changes else published_config(path, arch)


def _outputs(weights: Weights, arch: str) -> int:
    """The number of classes of a state dict's classifier, 0 if it has none."""
    found = (weights.get(f"{layer}.weight") for layer in classifiers_of(arch))
    return next((len(classifier) for classifier in found if classifier is not None and classifier.ndim > 1), 0)


def _load_state(model: nn.Module, weights: Weights, path: Path, arch: str, classifier: Weights | None = None) -> None:
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
    outputs = _outputs(weights, "resnet18")
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
            configs = ["config.json", "preprocessor_config.json"]
            return Path(snapshot_download(match[1], revision=match[2], allow_patterns=[*configs, *names]))

        folder = get("model.safetensors")
        return folder if (folder / "model.safetensors").is_file() else get("pytorch_model.bin")
    except ImportError as error:
        raise UserError(f"{source}: needs huggingface_hub", "pip install -e '.[export]'") from error
    except Exception as error:  # from the network, the server, the cache, the name
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{source}: cannot be downloaded ({why})", "check its name, the network, and HF_TOKEN if it is private"
        ) from error
