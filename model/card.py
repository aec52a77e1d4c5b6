"""What stands beside exported weights: config.json as timm writes it, and README.md, the model card of the Hugging Face Hub."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from model.resnet import ResNet
from model.weights import ModelConfig
from pipeline.pixels.normalize import Normalization

# The nets that torchvision and timm have, by the same names.
ELSEWHERE = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


@dataclass(frozen=True)
class About:
    """What a card tells that the weights do not. formats: those written. repo: user/name on the Hub. license: its SPDX name.

    figures: for each testing scheme, its top-1 and top-5 shares of `images` validation images.
    """

    formats: list[str]
    dataset: str | None = None
    license: str | None = None
    repo: str | None = None
    figures: dict[str, tuple[float, float]] = field(default_factory=dict)
    images: int = 0


def timm_config(net: ResNet, recipe: ModelConfig) -> dict[str, Any]:
    """config.json's content. A mean image is there as its mean per channel, the only one that timm can subtract."""
    normalization = Normalization.of(recipe.mean, recipe.std).per_channel()
    crop = recipe.image_size / recipe.eval_short
    if math.floor(recipe.image_size / crop) != recipe.eval_short:  # by rounding
        crop = math.nextafter(crop, 0)
    config: dict[str, Any] = {
        "architecture": recipe.arch,
        "num_classes": net.fc.out_features,
        "num_features": net.fc.in_features,
        "global_pool": "avg",
    }
    if recipe.classes:
        config["label_names"] = recipe.classes
    config["pretrained_cfg"] = {
        "num_classes": net.fc.out_features,
        "input_size": [3, recipe.image_size, recipe.image_size],
        "fixed_input_size": False,
        "crop_pct": crop,
        "crop_mode": "center",
        "interpolation": "bilinear",
        "mean": [float(value) / 255 for value in normalization.mean],
        "std": [float(value) / 255 for value in normalization.std],
        "first_conv": "conv1",
        "classifier": "fc",
    }
    return config


def model_card(net: ResNet, recipe: ModelConfig, about: About) -> str:
    """README.md's content."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    name = about.repo.split("/")[-1] if about.repo else f"{recipe.arch}-{net.fc.out_features}"
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=about.dataset or "image-folder",
            dataset_name=about.dataset or "the data it was trained on",
            metric_type="accuracy",
            metric_name=f"{metric}, {scheme}",
            metric_value=share,
        )
        for scheme, shares in about.figures.items()
        for metric, share in zip(("top-1", "top-5"), shares, strict=True)
    ]
    data = ModelCardData(
        license=about.license,
        library_name="timm" if recipe.arch in ELSEWHERE and "safetensors" in about.formats else "cropfeed",
        pipeline_tag="image-classification",
        tags=["image-classification", "resnet", "cropfeed", *(["timm"] if recipe.arch in ELSEWHERE else [])],
        datasets=[about.dataset] if about.dataset else None,
        metrics=["accuracy"] if results else None,
        model_name=name if results else None,
        eval_results=results or None,
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_text(name, net, recipe, about)}"))


def _text(name: str, net: ResNet, recipe: ModelConfig, about: About) -> str:
    parameters = sum(parameter.numel() for parameter in net.parameters())
    blur = ", with the BlurPool of [Zhang 2019](https://arxiv.org/abs/1904.11486)" if recipe.arch.endswith("_blur") else ""
    parts = [
        f"# {name}",
        f"`{recipe.arch}` of He et al. 2015, [Deep residual learning for image recognition](https://arxiv.org/abs/1512.03385)"
        f"{blur}: {parameters:,} parameters, {net.fc.out_features} classes. Exported by Cropfeed.",
        *_figures(about),
        "## Preprocessing",
        _preprocessing(recipe),
        "## Use",
        *(_safetensors(net, recipe, about) if "safetensors" in about.formats else []),
        *_graphs(recipe, about),
    ]
    return "\n\n".join(parts) + "\n"


def _figures(about: About) -> list[str]:
    rows = [f"| {scheme} | {top1:.2%} | {top5:.2%} |" for scheme, (top1, top5) in about.figures.items()]
    head = f"| of {about.images} validation images | top-1 | top-5 |\n| --- | --- | --- |\n"
    return [head + "\n".join(rows)] if rows else []


def _preprocessing(recipe: ModelConfig) -> str:
    size = recipe.image_size
    if recipe.mean.ndim == 3:
        mean = f"subtract the mean image (`mean.npy`, float32 ({size}, {size}, 3): a value for each pixel)"
        remark = " `config.json` can only hold its mean per channel, with which logits differ a little."
    else:
        mean, remark = f"subtract the mean {_three(recipe.mean)}", ""
    return (
        f"Resize so that the short side is {recipe.eval_short} pixels (bilinear, antialiased), crop the central {size} x {size}, "
        f"take RGB in 0..255, {mean}, divide by {_three(recipe.std)}.{remark}"
    )


def _three(values: Any) -> str:
    return "(" + ", ".join(f"{float(value):.6g}" for value in values) + ")"


def _safetensors(net: ResNet, recipe: ModelConfig, about: About) -> list[str]:
    source = f"hf://{about.repo}" if about.repo else "FOLDER"
    parts = [
        "With Cropfeed, whose recipe (classes, sizes, mean) is in the header of `model.safetensors`:",
        f'```python\nfrom model.loading import load_net\n\nnet, recipe = load_net("{source}", None, None)\n```',
    ]
    if recipe.arch not in ELSEWHERE:
        return [*parts, f"timm and torchvision have no `{recipe.arch}`; `config.json` tells the preprocessing in timm's terms."]
    hub = f"hf-hub:{about.repo}" if about.repo else "local-dir:FOLDER"
    return [
        *parts,
        "With timm:",
        f'```python\nimport timm\n\nnet = timm.create_model("{hub}", pretrained=True)\n```',
        "With torchvision, whose keys these are:",
        "```python\nfrom safetensors.torch import load_file\nfrom torchvision.models import "
        f"{recipe.arch}\n\nnet = {recipe.arch}(num_classes={net.fc.out_features})\n"
        'net.load_state_dict(load_file("model.safetensors"))\n```',
    ]


def _graphs(recipe: ModelConfig, about: About) -> list[str]:
    size = recipe.image_size
    shape = f"{size}, {size}" if recipe.mean.ndim == 3 else "H, W"
    files = {"onnx": "`model.onnx` (ONNX)", "torch-export": "`model.pt2` (`torch.export.load`)"}
    written = [text for form, text in files.items() if form in about.formats]
    if not written:
        return []
    return [
        f"Graphs that contain the normalization: {' and '.join(written)}. Input `images`: uint8 (N, 3, {shape}), RGB, "
        f"resized and cropped. Output `logits`: float32 (N, classes)."
    ]
