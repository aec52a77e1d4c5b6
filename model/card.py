"""Files beside exported weights: config.json in timm's format, and README.md, the model card for the Hugging Face Hub."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from html import escape
from typing import Any

from torch import nn

from model.make import PREFIX, bare_name, classes_of, classifiers_of, has_one_size, timm_cfg
from model.schemes import central_crop
from model.weights import ModelConfig
from pipeline.pixels.normalize import Normalization
from pipeline.store.class_names import class_name

# The models that torchvision and timm have under the same names.
SHARED_ARCHS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


def is_in_timm(arch: str) -> bool:
    return arch.startswith(PREFIX) or arch in SHARED_ARCHS


@dataclass(frozen=True)
class CardDetails:
    """The content of a model card beyond the model and its config.

    formats: the exported formats. dataset, repo: user/name on the Hub. license: the SPDX identifier of the weights' license.
    figures: top-1 and top-5 rates by testing scheme, measured on `images` validation images.
    """

    formats: tuple[str, ...]
    dataset: str | None = None
    license: str | None = None
    repo: str | None = None
    figures: dict[str, tuple[float, float]] = field(default_factory=dict)
    images: int = 0


def timm_config(model: nn.Module, config: ModelConfig) -> dict[str, Any]:
    """The content of config.json. A mean image becomes its mean per channel, the only kind of mean that timm can subtract."""
    normalization = Normalization.of(config.mean, config.std).per_channel()
    crop = config.image_size / config.eval_short
    if math.floor(config.image_size / crop) != config.eval_short:  # a rounding error
        crop = math.nextafter(crop, 0)
    is_timm = config.arch.startswith(PREFIX)
    classifiers = classifiers_of(config.arch)
    content: dict[str, Any] = {
        "architecture": bare_name(config.arch),
        "num_classes": classes_of(model),
        "num_features": model.num_features,
    }
    if not is_timm:
        content["global_pool"] = "avg"
    if config.classes:
        content["label_names"] = config.classes
    content["pretrained_cfg"] = {
        "num_classes": classes_of(model),
        "input_size": [3, config.image_size, config.image_size],
        "fixed_input_size": has_one_size(config.arch),
        "crop_pct": crop,
        "crop_mode": "squash" if config.resizing == "square" else "center",
        "interpolation": config.interpolation,
        "mean": [float(value) / 255 for value in normalization.mean],
        "std": [float(value) / 255 for value in normalization.std],
        "first_conv": timm_cfg(config.arch).get("first_conv") if is_timm else "conv1",
        "classifier": classifiers[0] if len(classifiers) == 1 else list(classifiers),
    }
    return content


def model_card(model: nn.Module, config: ModelConfig, details: CardDetails) -> str:
    """The content of README.md."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    name = details.repo.split("/")[-1] if details.repo else f"{bare_name(config.arch)}-{classes_of(model)}"
    family = [] if config.arch.startswith(PREFIX) else ["resnet"]
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=details.dataset or "image-folder",
            dataset_name=details.dataset or "the data it was trained on",
            metric_type="accuracy",
            metric_name=f"{metric}, {scheme}",
            metric_value=rate,
        )
        for scheme, rates in details.figures.items()
        for metric, rate in zip(("top-1", "top-5"), rates, strict=True)
    ]
    data = ModelCardData(
        license=details.license,
        library_name="timm" if is_in_timm(config.arch) and "safetensors" in details.formats else "cropfeed",
        pipeline_tag="image-classification",
        tags=["image-classification", *family, "cropfeed", *(["timm"] if is_in_timm(config.arch) else [])],
        datasets=[details.dataset] if details.dataset else None,
        metrics=["accuracy"] if results else None,
        model_name=name if results else None,
        eval_results=results or None,
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_text(name, model, config, details)}"))


def _text(name: str, model: nn.Module, config: ModelConfig, details: CardDetails) -> str:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    blur = ", with the BlurPool of [Zhang 2019](https://arxiv.org/abs/1904.11486)" if config.arch.endswith("_blur") else ""
    what = "of He et al. 2015, [Deep residual learning for image recognition](https://arxiv.org/abs/1512.03385)" + blur
    if config.arch.startswith(PREFIX):
        what = "of [timm](https://github.com/huggingface/pytorch-image-models)"
    parts = [
        f"# {name}",
        f"`{bare_name(config.arch)}` {what}: {parameters:,} parameters, {classes_of(model)} classes. Exported by Cropfeed.",
        *_figures(details),
        "## Preprocessing",
        _preprocessing(config),
        _loader(config),
        "## Use",
        *(_safetensors(model, config, details) if "safetensors" in details.formats else []),
        *_graphs(config, details),
        *_classes(config),
    ]
    return "\n\n".join(parts) + "\n"


def _figures(details: CardDetails) -> list[str]:
    rows = [f"| {scheme} | {top1:.2%} | {top5:.2%} |" for scheme, (top1, top5) in details.figures.items()]
    head = f"| of {details.images} validation images | top-1 | top-5 |\n| --- | --- | --- |\n"
    return [head + "\n".join(rows)] if rows else []


def _preprocessing(config: ModelConfig) -> str:
    size = config.image_size
    if config.mean.ndim == 3:
        mean = f"subtract the mean image (`mean.npy`, float32 ({size}, {size}, 3): one value for each pixel)"
        remark = " `config.json` can only hold its mean per channel, which gives slightly different logits."
    else:
        mean, remark = f"subtract the mean {_three(config.mean)}", ""
    side = "both sides are" if config.resizing == "square" else "the short side is"
    return (
        f"Resize so that {side} {config.eval_short} pixels ({config.interpolation}, antialiased), "
        f"crop the central {size} x {size}, "
        f"take RGB in 0..255, {mean}, divide by {_three(config.std)}.{remark}"
    )


def _loader(config: ModelConfig) -> str:
    """The same preprocessing as code that uses the library."""
    has_mean_image, geometry = config.mean.ndim == 3, central_crop(config)
    bicubic = ', interpolation="bicubic"' if config.interpolation == "bicubic" else ""
    mean = 'numpy.load("mean.npy")' if has_mean_image else _three(config.mean)
    return (
        "`pip install cropfeed` gives a loader that does this, from shards that `cropfeed shards IMAGES --out SHARDS` makes:\n\n"
        "```python\n" + ("import numpy\n" if has_mean_image else "")
        + f"from cropfeed import {type(geometry).__name__}, LoaderSpec, Normalization, open_loader\n\n"
        f"normalization = Normalization.of({mean}, {_three(config.std)})\n"
        f'spec = LoaderSpec("SHARDS", image_size={config.image_size}, normalization=normalization{bicubic})\n'
        f'for images, labels, ids in open_loader(spec.evaluation("val", geometry={geometry})):\n'
        "    ...\n```"
    )  # fmt: skip


def _three(values: Any) -> str:
    return "(" + ", ".join(f"{float(value):.6g}" for value in values) + ")"


def _safetensors(model: nn.Module, config: ModelConfig, details: CardDetails) -> list[str]:
    source = f"hf://{details.repo}" if details.repo else "FOLDER"
    parts = [
        "With a checkout of Cropfeed (the pip package contains no models). The header of `model.safetensors` holds the config:",
        f'```python\nfrom model.loading import load_model\n\nmodel, config = load_model("{source}", None, None)\n```',
    ]
    if not is_in_timm(config.arch):
        return [*parts, f"timm and torchvision have no `{config.arch}`; `config.json` gives the preprocessing in timm's format."]
    hub = f"hf-hub:{details.repo}" if details.repo else "local-dir:FOLDER"
    parts += ["With timm:", f'```python\nimport timm\n\nmodel = timm.create_model("{hub}", pretrained=True)\n```']
    if config.arch not in SHARED_ARCHS:
        return parts
    return [
        *parts,
        "With torchvision, which has the same state-dict keys:",
        "```python\nfrom safetensors.torch import load_file\nfrom torchvision.models import "
        f"{config.arch}\n\nmodel = {config.arch}(num_classes={classes_of(model)})\n"
        'model.load_state_dict(load_file("model.safetensors"))\n```',
    ]


def _graphs(config: ModelConfig, details: CardDetails) -> list[str]:
    size = config.image_size
    shape = f"{size}, {size}" if config.mean.ndim == 3 or config.arch.startswith(PREFIX) else "H, W"
    files = {"onnx": "`model.onnx` (ONNX)", "torch-export": "`model.pt2` (`torch.export.load`)"}
    written = [text for form, text in files.items() if form in details.formats]
    if not written:
        return []
    return [
        f"Graphs that contain the normalization: {' and '.join(written)}. Input `images`: uint8 (N, 3, {shape}), RGB, "
        f"resized and cropped. Output `logits`: float32 (N, classes)."
    ]


def _classes(config: ModelConfig) -> list[str]:
    """The classes with their labels, in a table that the reader unfolds."""
    names = [escape(class_name(one, config.class_names), quote=False).replace("|", "\\|") for one in config.classes]
    rows = "\n".join(f"| {label} | {name} |" for label, name in enumerate(names))
    table = f"| label | class |\n| --- | --- |\n{rows}"
    return ["## Classes", f"<details><summary>{len(names):,} classes</summary>", table, "</details>"] if names else []
