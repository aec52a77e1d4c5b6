"""For gpu_check.py: pixels and logits on the device against Pillow and torchvision.

Pixels are compared on drawn images, and on unusual ones: every chroma subsampling, restart intervals, tiny and odd sizes; with
each engine, on every profile, with all and with none of the images on the GPU's hardware JPEG decoder. Batches of the first steps
are held and compared after many more, when their memory would have been overwritten if the loader reused it.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image

from model import ARCHS
from pipeline import open_loader
from pipeline.batch import Batch, BatchPlan
from pipeline.convert.make import ConvertOptions, make_shards
from pipeline.loader import Loader
from pipeline.pixels.reference import apply
from pipeline.plan.geometry import PaddedCrop
from pipeline.spec import LoaderSpec
from tools.bench.gpu_setting import Setting, engines
from tools.profiler.loaders import endless

MEAN_LIMIT, PERCENTILE_LIMIT = 1.0, 4.0  # of 255; JPEG decoders differ in their inverse DCT
SUBSAMPLINGS = ("444", "422", "420", "440", "411", "Gray")
SIZES = ((1, 1), (9, 7), (33, 65), (375, 501))  # heights and widths
RESTARTS = (1, 5)  # restart intervals, MCUs
HELD = 3  # batches
STEPS = 200  # with held batches, on a GPU
TORCHVISION_ARCHS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


def write_unusual_images(folder: Path) -> int:
    """Write JPEGs of every subsampling and size, and some with restart intervals. Returns their number."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    encoded: dict[str, bytes] = {}
    for height, width in SIZES:
        coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
        pixels = np.array(coarse.resize((width, height), Image.Resampling.BICUBIC))
        for subsampling in SUBSAMPLINGS:
            space, values = ("GRAY", pixels[..., :1].copy()) if subsampling == "Gray" else ("RGB", pixels)
            encoded[f"{subsampling}-{height}x{width}"] = simplejpeg.encode_jpeg(values, 90, space, subsampling)
    for name in ("4:4:4", "4:2:2", "4:2:0"):  # in the last size
        for interval in RESTARTS:
            stream = io.BytesIO()
            Image.fromarray(pixels).save(stream, "JPEG", quality=90, subsampling=name, restart_marker_blocks=interval)
            encoded[f"restart-{name.replace(':', '')}-{interval}"] = stream.getvalue()
    for name, data in encoded.items():
        (folder / f"{name}.JPEG").write_bytes(data)
    return len(encoded)


def view_differences(loader: Loader, plan: BatchPlan, batch: Batch) -> Iterator[np.ndarray]:
    """Absolute differences of each view of a batch from the reference, float32 (H, W, 3). For batches of float32."""
    normalization = loader.normalization_at(plan.size)
    views = batch.images.float().permute(0, 2, 3, 1).cpu().numpy()
    for index, pixels in enumerate(views):
        image = Image.open(io.BytesIO(loader.read(int(batch.ids[index // loader.crops])).tobytes()))
        window, flip, alphas = (array[index] for array in plan.views[:3])
        shift = plan.views.shift[index] if plan.views.shift is not None else (0, 0)
        expected = apply(image, window, bool(flip), alphas, plan.size, loader.lighting_basis, normalization, shift)
        yield np.abs(pixels - expected)


def differences(spec: LoaderSpec, steps: int, held: int) -> tuple[str, list[float], list[float]]:
    """Take `steps` batches of float32. Then compare the first ones, which are held meanwhile, and the last with the reference.

    Returns the engine and, for each view, the mean and the 99.9th percentile of its differences.
    """
    loader = open_loader(spec)
    ranges = loader.upcoming(next(loader.batch_ranges(0, 0)))
    kept = []
    for step, (batch_range, batch) in enumerate(zip(ranges, islice(endless(loader), steps), strict=False)):
        if step < held or step == steps - 1:
            kept.append((loader.plan(batch_range), batch))
    found = [pixels for plan, batch in kept for pixels in view_differences(loader, plan, batch)]
    loader.close()
    return loader.engine, [float(one.mean()) for one in found], [float(np.percentile(one, 99.9)) for one in found]


def check(setting: Setting, name: str, spec: LoaderSpec, steps: int = 2, held: int = 2) -> bool:
    """Record the differences, see `differences`. Returns whether they are within the limits."""
    spec = replace(spec, dtype=torch.float32)
    engine, means, percentiles = differences(spec, steps, held)
    figures = {"mean_difference": means, "percentile_99.9_difference": percentiles}
    setting.record(f"pixels, {name}", engine, figures, spec, f"{steps} steps")
    good = max(means) <= MEAN_LIMIT and max(percentiles) <= PERCENTILE_LIMIT
    print(f"pixels, {name} ({engine}): {'ok' if good else 'FAILED'}", flush=True)
    return good


def check_pixels(setting: Setting, steps: int | None = None) -> Iterator[bool]:
    """Compare each engine with Pillow: first on drawn images in training, in evaluation and with padded crops, then on unusual
    images. steps: how many with held batches."""
    steps = steps or (STEPS if setting.gpu else 2 * HELD)
    available = engines()[::-1]  # DALI decodes on the GPU
    for engine in available:
        spec = replace(setting.spec, engine=engine, batch_size=min(64, setting.spec.batch_size))
        yield check(setting, "training", spec)
        yield check(setting, "evaluation", spec.evaluation("train"))
        yield check(setting, "padded crops", replace(spec, geometry=PaddedCrop(spec.final_size // 8)))
    count = write_unusual_images(setting.folder / "unusual" / "a")
    setting = replace(setting, images="unusual images")
    for profile in setting.data:
        shards = setting.folder / f"unusual-{profile}"
        make_shards(ConvertOptions(str(setting.folder / "unusual"), str(shards), profile, workers=1))
        for engine in available:
            for share in (0.0, 1.0) if engine == "dali" else (0.0,):
                spec = replace(setting.spec, data=shards, engine=engine, hw_decoder_load=share, batch_size=count)
                name = f"{profile}" + (f", hardware share {share:g}" if engine == "dali" else "")
                yield check(setting, f"{name}, held batches", spec, steps, HELD)
                yield check(setting, f"{name}, evaluation", spec.evaluation("train"), 1)


@torch.inference_mode()
def difference_of_logits(models: Sequence[torch.nn.Module], images: torch.Tensor) -> float:
    """The largest difference of two models' logits, with the weights of the first, relative to the largest logit."""
    mine, other = models
    other.load_state_dict(mine.state_dict())
    expected = other.eval().to(images.device)(images)
    return float((mine.eval().to(images.device)(images) - expected).abs().max() / expected.abs().max())


def check_models(setting: Setting) -> Iterator[bool]:
    """Compare the logits of our models with those of torchvision's, with the same weights, in float32."""
    try:
        from torchvision import models
    except ImportError:
        print("models: torchvision is not installed, nothing to compare with", flush=True)
        return
    images = torch.randn(4, 3, 96, 64, device=setting.spec.device)
    for arch in TORCHVISION_ARCHS:
        torch.manual_seed(0)
        difference = difference_of_logits((ARCHS[arch](), getattr(models, arch)()), images)
        figures = {"relative_difference_of_logits": [difference]}
        setting.record(f"nets, {arch}", "torch", figures, more="random images, torchvision's, float32")
        yield difference < 1e-3  # convolutions in TF32 or in another order
