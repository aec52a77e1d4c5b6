"""Every check and benchmark that needs a GPU: python tools/bench/gpu_check.py

Prints the doctor's report, then runs the parts below, the most important ones first. Each part prints its rows when it ends, and
appends them to results/gpu.csv. All parts together take less than 8 minutes on one data-centre GPU. The exit code is 1 if a check
failed. The images are synthetic unless --source names real ones. The script requires DALI and what train.py requires.
`--device cpu` with small sizes tests the script itself without a GPU; its figures mean nothing.

- pixels: the GPU graph against the Pillow reference (mean difference <= 1, 99.9th percentile <= 4, of 255).
- train: images/s of a bf16 training step of each --arch from shards, and of the same step on one synthetic batch, in turns (goal:
  a ratio of 0.98, with a data wait under 1 %); peak memory; the step's share of the tensor cores' peak, for known cards.
- steps: the train step of the first --arch, compiled and eager, against those of torchvision and timm, if these are installed
  (goal: 1.1 times their throughput).
- loader: images/s of every engine alone, into GPU memory, for original, lossless and compact shards, for several shares of the
  hardware JPEG decoder, and for cut and whole streams; in turns with the stock DALI pipeline. Goals: twice stock DALI, and three
  times the demand of training.
- profile: the profiler's verdict on training with these shards, with times from the GPU's clock and utilization from NVML.
- models: logits against those of torchvision's ResNets, if torchvision is installed.
- imagenette, if --imagenette names its shards: minutes that ResNet-18 needs to 90 % top-1 at 128 and at 160 pixels. The figures
  go to gpu_accuracy.csv and gpu_accuracy_runs.csv, beside gpu.csv.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import _path  # noqa: F401
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from model import ARCHS
from pipeline import open_loader
from pipeline.cli import Parser, positive, run_cli
from pipeline.convert.make import ConvertOptions, make_shards
from pipeline.cores import cores_per_process
from pipeline.errors import UserError
from pipeline.loader import Loader
from pipeline.pixels.reference import apply
from pipeline.plan import sampling
from pipeline.plan.geometry import PaddedCrop, ScaleJitter
from pipeline.spec import LoaderSpec
from tools import ROOT
from tools.bench.gpu_loader import measure_loaders
from tools.bench.gpu_train import measure_steps, measure_train
from tools.bench.recording import RESULTS, Figure, record
from tools.make_demo_data import make_demo_data
from tools.profiler.options import ProfileOptions
from tools.profiler.profile import profile
from tools.profiler.table import table

MEAN_LIMIT, PERCENTILE_LIMIT = 1.0, 4.0  # of 255; JPEG decoders differ in their inverse DCT
REPEATS = 5
PARTS = ("pixels", "train", "steps", "loader", "profile", "models", "imagenette")  # most important first
TORCHVISION_ARCHS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
ROWS = RESULTS / "gpu.csv"


@dataclass(frozen=True)
class GpuCheckOptions:
    """What to check. source: folder of class folders of JPEGs. images: number of synthetic images for each of 8 classes, if
    `source` is None. imagenette: folder of Imagenette's shards. seconds: duration of each repeat. Raises UserError for a missing
    GPU, and for `device` cpu with the file of GPU rows."""

    device: str = "cuda"
    arch: tuple[str, ...] = ("resnet50", "resnet18", "resnet152")
    parts: tuple[str, ...] = PARTS
    batch_size: int = 256
    image_size: int = 224
    source: Path | None = None
    imagenette: Path | None = None
    images: int = 250
    seconds: float = 2.0
    results: Path = ROWS

    def __post_init__(self) -> None:
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise UserError("torch sees no CUDA GPU", "run this on a machine that has one")
        if self.device == "cpu" and self.results == ROWS:
            raise UserError("`device` cpu measures no GPU", "give another `results` file")

    @property
    def images_in_words(self) -> str:
        return self.source.name if self.source else "drawn images"


@dataclass(frozen=True)
class Difference:
    """A view's pixels against the reference. pixels: absolute differences, (H, W, 3)."""

    sample: int
    pixels: npt.NDArray[np.float32]

    @property
    def percentile(self) -> float:
        """The 99.9th percentile."""
        return float(np.percentile(self.pixels, 99.9))


def pixel_differences(loader: Loader) -> list[Difference]:
    """The differences of each view of each sample in the rest of the epoch. For loaders with one rank."""
    found = []
    ranges = loader.batch_ranges(loader.epoch, loader.consumed)
    for batch_range, batch in zip(ranges, loader, strict=True):
        plan = loader.plan(batch_range)
        normalization = loader.normalization_at(plan.size)
        views = batch.images.float().permute(0, 2, 3, 1).cpu().numpy()
        for index, pixels in enumerate(views):
            sample = int(batch.ids[index // loader.crops])
            image = Image.open(io.BytesIO(loader.read(sample).tobytes()))
            window, flip, alphas = (array[index] for array in plan.views[:3])
            shift = plan.views.shift[index] if plan.views.shift is not None else (0, 0)
            expected = apply(image, window, bool(flip), alphas, plan.size, loader.lighting_basis, normalization, shift)
            found.append(Difference(sample, np.abs(pixels - expected)))
    return found


def check_pixels(spec: LoaderSpec, results: Path, images: str) -> bool:
    """Compare the graph on the device with Pillow, in training and in evaluation, in float32. Returns whether the differences
    are within the limits. images: their description in the rows."""
    good = True
    spec = replace(spec, dtype=torch.float32, batch_size=min(64, spec.batch_size))
    padded = replace(spec, geometry=PaddedCrop(spec.final_size // 8))
    checked = {"training": spec, "evaluation": spec.evaluation("train"), "padded crops": padded}
    for name, chosen in checked.items():
        loader = open_loader(chosen)
        found = pixel_differences(loader)
        loader.close()
        means = [float(difference.pixels.mean()) for difference in found]
        percentiles = [difference.percentile for difference in found]
        figures = Figure("mean_difference", means), Figure("percentile_99.9_difference", percentiles)
        record(results, f"pixels, {name}", *figures, engine="dali", spec=describe(chosen, images), cache="warm")
        good &= max(means) <= MEAN_LIMIT and max(percentiles) <= PERCENTILE_LIMIT
    print(f"pixels: {'ok' if good else 'FAILED'}", flush=True)
    return good


@torch.inference_mode()
def check_models(device: str, results: Path) -> bool:
    """Compare the logits of our models with those of torchvision's, with the same weights, in float32. Returns whether all
    differences are small."""
    try:
        from torchvision import models
    except ImportError:
        print("models: torchvision is not installed, nothing to compare with", flush=True)
        return True
    good = True
    images = torch.randn(4, 3, 96, 64, device=device)
    for arch in TORCHVISION_ARCHS:
        torch.manual_seed(0)
        model, reference = ARCHS[arch]().eval(), getattr(models, arch)().eval()
        reference.load_state_dict(model.state_dict())
        expected = reference.to(device)(images)
        difference = float((model.to(device)(images) - expected).abs().max() / expected.abs().max())
        figure = Figure("relative_difference_of_logits", [difference])
        record(results, f"nets, {arch}", figure, engine="torch", spec=f"torchvision's, float32, {device}", cache="warm")
        good &= difference < 1e-3  # convolutions in TF32 or in another order
    print(f"models: {'ok' if good else 'FAILED'}", flush=True)
    return good


def describe(spec: LoaderSpec, images: str) -> str:
    """A row's spec. images: their description."""
    dtype = str(spec.dtype).removeprefix("torch.")
    crop = f"{spec.geometry} to {spec.image_size}"
    return f"{images}, {crop}, batch {spec.batch_size}, {dtype}, {spec.device}, {spec.threads} threads"


def check_profiler(spec: LoaderSpec, arch: str, seconds: float) -> bool:
    """Print the profiler's verdict on training a model on the device. Returns whether the profile contains a demand and a
    verdict."""
    options = ProfileOptions(
        spec, arch=arch, precision="bf16", cache_state="warm", engines=("dali", "cpu"), repeats=REPEATS, seconds=seconds / 2
    )
    found = profile(options)
    print(table(found), flush=True)
    return bool(found["demand"] and found["verdict"]["limit"] in ("input", "compute", "balanced"))


def make_data(folder: Path, source: Path | None, per_class: int, profiles: Sequence[str]) -> dict[str, Path]:
    """Shards by profile, made from the images in `source`, or from synthetic ones: 4:4:4, 4:2:0, 4:2:2 and grey."""
    if source is None:
        source = folder / "images"
        make_demo_data(source, per_class, 8, 0, os.cpu_count() or 1)
    shards = {}
    for name in profiles:
        shards[name] = folder / name
        make_shards(ConvertOptions(str(source), str(shards[name]), name, shard_size=250))
    return shards


def check_parts(options: GpuCheckOptions, data: dict[str, Path], spec: LoaderSpec) -> bool:
    """Run the parts; returns whether all checks passed. data: see `make_data`."""
    results, seconds, first, images = options.results, options.seconds, options.arch[0], options.images_in_words
    described = describe(spec, images)
    good = True
    for part in sorted(options.parts, key=PARTS.index):
        if part == "pixels":
            good &= check_pixels(spec, results, images)
        elif part == "train":
            for arch in options.arch:
                measure_train(replace(spec, engine="dali"), arch, results, seconds, REPEATS, described)
        elif part == "steps":
            measure_steps(spec, first, results, seconds, REPEATS, described)
        elif part == "loader":
            measure_loaders(data, spec, results, seconds / 2, REPEATS, images)
        elif part == "profile":
            good &= check_profiler(spec, first, seconds)
        elif part == "models":
            good &= check_models(options.device, results)
        elif options.imagenette:
            for size in (128, 160):
                good &= train_imagenette(options.imagenette, size, results)
    return good


def train_imagenette(shards: Path, size: int, results: Path) -> bool:
    """Measure the time to 90 % with recipe imagenette, but with more epochs and at `size` pixels. Returns whether the training
    succeeded."""
    accuracy = results.with_name(f"{results.stem}_accuracy.csv")
    with tempfile.TemporaryDirectory() as work:
        training = ["--arch", "resnet18", "--image-size", size, "--start-size", size - 32, "--eval-size", size, "--epochs", 40]
        command = [
            sys.executable, Path(__file__).with_name("bench_accuracy.py"), "--shards", shards, "--images", shards, "--work", work,
            "--contenders", "cropfeed", "--seeds", 0, "--levels", 80, 85, 90, "--results", accuracy, "--", *training,
        ]  # fmt: skip
        return subprocess.run([str(word) for word in command], check=False).returncode == 0


def parse() -> GpuCheckOptions:
    parser = Parser(__doc__)
    parser.add_argument("--device", help="torch device (default: cuda)")
    parser.add_argument("--arch", nargs="+", choices=ARCHS, metavar="ARCH", help="models (default: resnet50 resnet18 resnet152)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="default: all, in this order")
    parser.add_argument("--batch-size", type=positive, help="default: 256")
    parser.add_argument("--image-size", type=positive, help="side of the crop, pixels (default: 224)")
    parser.add_argument("--source", type=Path, help="folder of class folders of JPEGs, instead of synthetic images")
    parser.add_argument("--imagenette", type=Path, help="folder of Imagenette's shards, for the last part")
    parser.add_argument("--images", type=positive, help="number of synthetic images for each of 8 classes (default: 250)")
    parser.add_argument("--seconds", type=float, help="duration of each repeat (default: 2)")
    parser.add_argument("--results", type=Path, help="file to append rows to (default: tools/bench/results/gpu.csv)")
    parser.set_defaults(**{field.name: field.default for field in fields(GpuCheckOptions)})
    args = vars(parser.parse_args())
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in args.items()}
    return GpuCheckOptions(**values)


def main() -> None:
    options = parse()
    torch.backends.cudnn.benchmark = True  # as in train.py and in the reference scripts
    subprocess.run([sys.executable, str(ROOT / "tools" / "doctor.py")], check=False)
    with tempfile.TemporaryDirectory() as folder:
        profiles = ("lossless", "original", "compact") if "loader" in options.parts else ("lossless",)
        data = make_data(Path(folder), options.source, options.images, profiles)
        spec = LoaderSpec(
            data["lossless"],
            batch_size=options.batch_size,
            image_size=options.image_size,
            geometry=ScaleJitter().scaled(options.image_size, sampling.CROP),
            dtype=torch.bfloat16,
            device=options.device,
            threads=cores_per_process(),
        )
        good = check_parts(options, data, spec)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    run_cli(main)
