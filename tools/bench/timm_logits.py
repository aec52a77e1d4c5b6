"""Compare the logits of timm's models on images from Cropfeed's loader and from timm's transforms.

    python tools/bench/timm_logits.py

Draws images, loads them once by Pillow and timm's create_transform, as timm's validation does, and once from shards with the
preset timm, and passes both to the same model with random weights. Records in results/timm_logits.json, for each model, the
largest difference of a logit, also relative to the logits' standard deviation, and what a test needs to compare the loader with
timm where timm is missing: timm's config and the scores of a fixed linear classifier on timm's pixels. Needs the extra `timm`.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import _path  # noqa: F401
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from model.make import make_model, timm_cfg
from model.preprocessing import of_timm
from model.schemes import central_crop
from model.weights import ModelConfig
from pipeline import LoaderSpec, Normalization, open_loader
from pipeline.cli import Parser, run_cli
from pipeline.convert.make import ConvertOptions, make_shards
from tools.bench.recording import RESULTS
from training.provenance import commit, hardware, versions

ARCHS = (
    "timm/resnet18.tv_in1k",  # bilinear
    "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k",  # bicubic
    "timm/convnext_atto.d2_in1k",  # bicubic, larger in tests than in training
    "timm/tf_efficientnetv2_b3.in21k_ft_in1k",  # bicubic, resized to a square
)
LIMIT = 1e-2  # of the difference
SHAPES = ((375, 500), (333, 271), (299, 467), (401, 300))  # height, width; resized, most of them have no whole number of pixels
CFG = ("input_size", "test_input_size", "interpolation", "crop_pct", "test_crop_pct", "crop_mode", "mean", "std")
SCORES = 16  # of the linear classifier


def draw(height: int, width: int, seed: int) -> Image.Image:
    """Waves of several lengths, and hard edges."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    pixels = np.full((height, width, 3), 128.0)
    for length in (160, 60, 23, 9):
        angle, *phases = rng.uniform(0, 2 * np.pi, 4)
        wave = (x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / length
        pixels += 25 * np.sin(wave[..., None] + phases)
    pixels += 30 * (np.sin(x / 17 + seed) * np.cos(y / 11) > 0)[..., None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def make_data(folder: Path) -> tuple[list[Path], Path]:
    """The drawn images as JPEGs, in the order of SHAPES, and shards of them."""
    paths = []
    for seed, (height, width) in enumerate(SHAPES):
        path = folder / "images" / "val" / "a" / f"{seed}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(height, width, seed).save(path, quality=95, subsampling=0)
        train = folder / "images" / "train" / "a" / path.name
        train.parent.mkdir(parents=True, exist_ok=True)
        train.write_bytes(path.read_bytes())
        paths.append(path)
    make_shards(ConvertOptions(str(folder / "images"), str(folder / "shards"), workers=1))
    return paths, folder / "shards"


def loaded(shards: Path, cfg: dict[str, Any]) -> torch.Tensor:
    """The images as the loader prepares them for a model with this cfg of timm: float32 (N, 3, H, W), normalized."""
    config = ModelConfig("", [], **of_timm(cfg, "timm"))
    spec = LoaderSpec(
        shards, batch_size=len(SHAPES), image_size=config.image_size, interpolation=config.interpolation, engine="cpu",
        normalization=Normalization.of(config.mean, config.std), threads=1,
    )  # fmt: skip
    with open_loader(spec.evaluation("val", geometry=central_crop(config))) as loader:
        (batch,) = loader
    return batch.images.contiguous()


def transformed(paths: list[Path], cfg: dict[str, Any]) -> torch.Tensor:
    """The images as timm's validation prepares them."""
    from timm.data import create_transform, resolve_data_config

    transform = create_transform(**resolve_data_config(pretrained_cfg=cfg, use_test_size=True), is_training=False)
    return torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])


def linear_scores(images: torch.Tensor) -> npt.NDArray[np.float64]:
    """The scores of a linear classifier with fixed random weights of length 1: (N, SCORES)."""
    pixels = images.numpy().reshape(len(images), -1).astype(np.float64)
    rng = np.random.default_rng(0)
    return np.stack(
        [pixels @ (weights / np.linalg.norm(weights)) for weights in (rng.random((SCORES, pixels.shape[1])) - 0.5)], 1
    )


@torch.inference_mode()
def compare(arch: str, paths: list[Path], shards: Path) -> dict[str, Any]:
    """The entry of an architecture in timm_logits.json."""
    cfg = {name: timm_cfg(arch).get(name) for name in CFG}
    theirs, ours = transformed(paths, cfg), loaded(shards, cfg)
    torch.manual_seed(0)
    model = make_model(arch).eval()
    expected, found = model(theirs), model(ours)
    difference = float((found - expected).abs().max())
    return {
        "cfg": cfg,
        "logits_std": float(expected.std()),
        "difference": difference,
        "relative": difference / float(expected.std()),
        "scores": linear_scores(theirs).round(6).tolist(),
    }


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS / "timm_logits.json", help="file to write (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths, shards = make_data(Path(folder))
        found = {arch: compare(arch, paths, shards) for arch in ARCHS}
    import timm

    origin = {"commit": commit(), "hardware": hardware(), "versions": f"{versions()}, timm {timm.__version__}"}
    args.results.write_text(json.dumps(origin | {"shapes": SHAPES, "archs": found}) + "\n", "utf-8")
    for arch, one in found.items():
        print(f"{arch}: logits differ by at most {one['difference']:.2g} ({one['relative']:.2%} of their standard deviation)")


if __name__ == "__main__":
    run_cli(main)
