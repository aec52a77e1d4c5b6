"""Every check and benchmark that needs a GPU: python tools/bench/gpu_check.py

Most important first, each printing its rows as it ends and appending them to results/gpu.csv; under 8 minutes in all on
one data-centre GPU. Exit code 1 if a check failed. It draws its own images, or takes real ones (--source). Needs what train.py
needs, and DALI.
`--device cpu` with small sizes runs the same code without a GPU, to see that it is whole; its figures mean nothing.

- pixels: the GPU graph against the Pillow reference (mean difference <= 1, 99.9th percentile <= 4, of 255).
- train: images/s of a bf16 training step of each --arch from shards, against the same step on one synthetic batch, alternating
  (goal: 0.98 of it, waiting under 1 %); peak memory; the step's share of the matrix units' peak, on a card where that is known.
- steps: the first --arch's train step, compiled and not, against torchvision's and timm's, where these are installed (goal: 1.1
  times theirs).
- feed: images/s of every engine alone, into GPU memory, for original, lossless and compact shards, several shares of the
  hardware JPEG decoder, cut against whole streams; and the stock DALI pipeline, in turns. Goals: twice stock DALI, and three
  times what the training eats.
- profile: the profiler's verdict on the same, with the GPU's own clock and NVML; the doctor's lines come first of all.
- nets: logits against torchvision's ResNets, where it is installed.
- imagenette, where --imagenette names its shards: minutes of ResNet-18 to 90 % top-1 at 128 and at 160 pixels.
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import _path  # noqa: F401
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from model import ARCHS
from pipeline import open_loader
from pipeline.cli import Parser, positive, run_cli
from pipeline.convert.make import ConvertOptions, make_shards
from pipeline.errors import UserError
from pipeline.loader import Loader
from pipeline.pixels.reference import apply
from pipeline.plan import sampling
from pipeline.plan.geometry import PaddedCrop, ScaleJitter
from pipeline.spec import LoaderSpec
from tools import ROOT
from tools.bench.gpu_feed import measure_feeds
from tools.bench.gpu_train import measure_net, measure_steps
from tools.bench.recording import Figure, record
from tools.make_demo_data import make_demo_data
from tools.profiler import profile as profiler
from tools.profiler.table import table
from training.launch import cores_per_process

MEAN_LIMIT, PERCENTILE_LIMIT = 1.0, 4.0  # of 255; JPEG decoders differ in their inverse DCT
REPEATS = 5
PARTS = ("pixels", "train", "steps", "feed", "profile", "nets", "imagenette")  # most important first
TORCHVISIONS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


@dataclass(frozen=True)
class Difference:
    """A view's pixels against the reference. pixels: absolute differences, (H, W, 3)."""

    sample: int
    pixels: npt.NDArray[np.float32]

    @property
    def percentile(self) -> float:
        """The 99.9th."""
        return float(np.percentile(self.pixels, 99.9))


def pixel_differences(loader: Loader) -> list[Difference]:
    """The differences of each view of each sample in the rest of an epoch. For loaders of one process."""
    found = []
    parts = loader.batch_ranges(loader.epoch, loader.consumed)
    for part, batch in zip(parts, loader, strict=True):
        work = loader.plan(part)
        normalization = loader.normalization_at(work.size)
        images = batch.images.float().permute(0, 2, 3, 1).cpu().numpy()
        for place, picture in enumerate(images):
            sample = int(batch.ids[place // loader.crops])
            image = Image.open(io.BytesIO(loader.shards.read(sample).tobytes()))
            window, flip, alphas = (column[place] for column in work.views[:3])
            shift = work.views.shift[place] if work.views.shift is not None else (0, 0)
            expected = apply(image, window, bool(flip), alphas, work.size, loader.basis, normalization, shift)
            found.append(Difference(sample, np.abs(picture - expected)))
    return found


def check_pixels(spec: LoaderSpec, results: Path, images: str) -> bool:
    """The graph on the device against Pillow, in training and in evaluation, as float32. True if within the limits."""
    good = True
    spec = replace(spec, dtype=torch.float32, batch_size=min(64, spec.batch_size))
    padded = replace(spec, geometry=PaddedCrop(spec.final_size // 8))
    for name, chosen in (
        ("pixels, training", spec),
        ("pixels, evaluation", spec.evaluation("train")),
        ("pixels, padded crops", padded),
    ):
        loader = open_loader(chosen)
        found = pixel_differences(loader)
        loader.close()
        means = [float(difference.pixels.mean()) for difference in found]
        percentiles = [difference.percentile for difference in found]
        for figure in (Figure("mean_difference", means), Figure("percentile_99.9_difference", percentiles)):
            record(results, name, figure, engine="dali", spec=describe(chosen, images), cache="warm")
        good &= max(means) <= MEAN_LIMIT and max(percentiles) <= PERCENTILE_LIMIT
    print(f"pixels: {'ok' if good else 'FAILED'}", flush=True)
    return good


@torch.inference_mode()
def check_nets(device: str, results: Path) -> bool:
    """Our nets against torchvision's, with the same weights, in float32: the greatest difference of a logit. True if small."""
    try:
        from torchvision import models
    except ImportError:
        print("nets: torchvision is not installed, nothing to compare with", flush=True)
        return True
    good = True
    images = torch.randn(4, 3, 96, 64, device=device)
    for arch in TORCHVISIONS:
        torch.manual_seed(0)
        ours, theirs = ARCHS[arch]().eval(), getattr(models, arch)().eval()
        theirs.load_state_dict(ours.state_dict())
        expected = theirs.to(device)(images)
        difference = float((ours.to(device)(images) - expected).abs().max() / expected.abs().max())
        figure = Figure("relative_difference_of_logits", [difference])
        record(results, f"nets, {arch}", figure, engine="torch", spec=f"torchvision's, float32, {device}", cache="warm")
        good &= difference < 1e-3  # convolutions in TF32 or in another order
    print(f"nets: {'ok' if good else 'FAILED'}", flush=True)
    return good


def describe(spec: LoaderSpec, images: str) -> str:
    """images: what they are."""
    dtype = str(spec.dtype).removeprefix("torch.")
    crop = f"{spec.geometry} to {spec.image_size}"
    return f"{images}, {crop}, batch {spec.batch_size}, {dtype}, {spec.device}, {spec.threads} threads"


def check_profiler(spec: LoaderSpec, arch: str, seconds: float) -> bool:
    """The profiler against the same net on the device: its verdict, for people. True if its figures have the documented form."""
    options = profiler.Options(
        name=str(spec.data), spec=spec, arch=arch, precision="bf16", demand=None, cache="warm", engines=("dali", "cpu"),
        repeats=REPEATS, seconds=seconds / 2, apply=False, tune=False, gpus=None, hosts=None, planted=None,
    )  # fmt: skip
    found = profiler.profile(options)
    print(table(found), flush=True)
    return bool(found["demand"] and found["verdict"]["limit"] in ("input", "compute", "balanced"))


def make_data(folder: Path, source: Path | None, per_class: int, profiles: Sequence[str]) -> dict[str, Path]:
    """Shards by profile, of the images in `source` or of drawn ones: 4:4:4, 4:2:0, 4:2:2 and grey."""
    if source is None:
        source = folder / "images"
        make_demo_data(source, per_class, 8, 0, os.cpu_count() or 1)
    shards = {}
    for profile in profiles:
        shards[profile] = folder / profile
        make_shards(ConvertOptions(str(source), str(shards[profile]), profile, shard_size=250))
    return shards


def check_parts(args: argparse.Namespace, data: dict[str, Path], spec: LoaderSpec) -> bool:
    """Do the --parts; False if a check failed. data: see `make_data`."""
    results, seconds, first = args.results, args.seconds, args.arch[0]
    images = args.source.name if args.source else "drawn images"
    described = describe(spec, images)
    good = True
    for part in sorted(args.parts, key=PARTS.index):
        if part == "pixels":
            good &= check_pixels(spec, results, images)
        elif part == "train":
            for arch in args.arch:
                measure_net(replace(spec, engine="dali"), arch, results, seconds, REPEATS, described)
        elif part == "steps":
            measure_steps(spec, first, results, seconds, REPEATS, described)
        elif part == "feed":
            measure_feeds(data, spec, results, seconds / 2, REPEATS, images)
        elif part == "profile":
            good &= check_profiler(spec, first, seconds)
        elif part == "nets":
            good &= check_nets(args.device, results)
        elif args.imagenette:
            for size in (128, 160):
                good &= train_imagenette(args.imagenette, size, results)
    return good


def train_imagenette(shards: Path, size: int, results: Path) -> bool:
    """Time to 90 % by recipe imagenette, longer and larger; False if it could not be trained."""
    with tempfile.TemporaryDirectory() as work:
        options = ["--arch", "resnet18", "--image-size", size, "--start-size", size - 32, "--eval-size", size, "--epochs", 40]
        command = [
            sys.executable, Path(__file__).with_name("bench_accuracy.py"), "--shards", shards, "--images", shards, "--work", work,
            "--contenders", "cropfeed", "--seeds", 0, "--levels", 80, 85, 90, "--results", results, "--", *options,
        ]  # fmt: skip
        return subprocess.run([str(word) for word in command], check=False).returncode == 0


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--arch", nargs="+", default=["resnet50", "resnet18", "resnet152"], choices=ARCHS, metavar="NET",
                        help="default: resnet50 resnet18 resnet152")  # fmt: skip
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="default: all, in this order")
    parser.add_argument("--batch-size", type=positive, default=256)
    parser.add_argument("--image-size", type=positive, default=224)
    parser.add_argument("--source", type=Path, help="folder of class folders of JPEGs, instead of drawn images")
    parser.add_argument("--imagenette", type=Path, help="folder of Imagenette's shards, for the last part")
    parser.add_argument("--images", type=positive, default=250, help="per class, of 8 (default: 250)")
    parser.add_argument("--seconds", type=float, default=2, help="per repeat (default: 2)")
    parser.add_argument("--results", type=Path, default=ROOT / "tools" / "bench" / "results" / "gpu.csv")
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("torch sees no CUDA GPU; run this on a machine that has one")
    if args.device == "cpu" and args.results == parser.get_default("results"):
        raise UserError("--device cpu measures no GPU; give another --results file")
    torch.backends.cudnn.benchmark = True  # as train.py and the reference scripts have it
    subprocess.run([sys.executable, str(ROOT / "tools" / "doctor.py")], check=False)
    with tempfile.TemporaryDirectory() as folder:
        profiles = ("lossless", "original", "compact") if "feed" in args.parts else ("lossless",)
        data = make_data(Path(folder), args.source, args.images, profiles)
        size = args.image_size
        spec = LoaderSpec(
            data["lossless"],
            batch_size=args.batch_size,
            image_size=size,
            geometry=ScaleJitter().scaled(size, sampling.CROP),
            dtype=torch.bfloat16,
            device=args.device,
            threads=cores_per_process(),
        )
        good = check_parts(args, data, spec)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    run_cli(main)
