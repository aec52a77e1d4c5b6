"""How strongly layers respond: python tools/paper/responses.py runs/plain56 runs/resnet56 --data /data/shards

Draws figure 7 of He et al. 2015: the standard deviation of each 3x3 layer's output after batch normalization, over the images of
a split at the central crop; in the order of the layers (top), and ranked (bottom). Residual nets should respond less than plain
ones, and deeper ones less than shallower ones: their layers change the signal less.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _path  # noqa: F401
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from tqdm import tqdm

from model.loading import load_model
from model.responses import Response, responses
from model.weights import ModelConfig
from pipeline import open_loader
from pipeline.cli import Parser, positive, run_cli
from pipeline.pixels.normalize import Normalization
from pipeline.plan.geometry import CentreCrop
from pipeline.spec import PRECISIONS, LoaderSpec
from pipeline.store.shards import Manifest
from training.launch import cores_per_process


def pictures(recipe: ModelConfig, args: Any) -> Iterator[torch.Tensor]:
    """Batches of the split's first images, as the net is fed: (N, 3, H, W)."""
    spec = LoaderSpec(
        args.data,
        batch_size=args.batch_size,
        image_size=recipe.image_size,
        normalization=Normalization.of(recipe.mean, recipe.std),
        dtype=PRECISIONS[args.precision],
        device=args.device,
        threads=cores_per_process(),
    ).evaluation(args.split, geometry=CentreCrop(recipe.eval_short))
    loader = open_loader(spec)
    left = args.images
    for batch in tqdm(loader, total=min(len(loader), -(-left // args.batch_size)), unit=" batches"):
        yield batch.images[:left]
        left -= len(batch.images)
        if left <= 0:
            break
    loader.close()


def draw(found: dict[str, list[Response]], picture: Path) -> None:
    figure, axes = plt.subplots(2, 1, figsize=(9, 7), layout="constrained", sharex=True)
    for name, layers in found.items():
        deviations = [layer.std for layer in layers]
        places = range(1, len(layers) + 1)
        axes[0].plot(places, deviations, marker=".", label=name)
        axes[1].plot(places, sorted(deviations, reverse=True), marker=".", label=name)
    axes[0].set(ylabel="std", xlabel="layer (original)")
    axes[1].set(ylabel="std", xlabel="layer (sorted by magnitude)")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.set_ylim(0, None)
    axes[0].legend()
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("weights", nargs="+", metavar="WEIGHTS_OR_RUN")
    parser.add_argument("--data", required=True, help="folder or URL (s3://...) of shards")
    parser.add_argument("--split", default="val")
    parser.add_argument("--images", type=positive, default=1000, help="how many of the split (1000)")
    parser.add_argument("--output", type=Path, default=Path("figure7.png"), help="the picture (figure7.png)")
    parser.add_argument("--csv", type=Path, help="write net, layer, std there")
    parser.add_argument("--arch", help="for weights that do not name it")
    parser.add_argument("--batch-size", type=positive, default=128)
    parser.add_argument("--precision", default="no", choices=PRECISIONS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    classes = Manifest(args.data).classes
    device, dtype = torch.device(args.device), PRECISIONS[args.precision]

    def autocast() -> Any:
        return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    found: dict[str, list[Response]] = {}
    for path in args.weights:
        net, recipe = load_model(path, args.arch, classes)
        net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        found[path] = responses(net, pictures(recipe, args), device, autocast)
        deviations = [layer.std for layer in found[path]]
        print(f"{path}: {recipe.arch}, {len(deviations)} layers, mean std {sum(deviations) / len(deviations):.3f}", flush=True)
    draw(found, args.output)
    if args.csv:
        with args.csv.open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["net", "layer", "std"])
            writer.writerows([path, layer.layer, f"{layer.std:.6g}"] for path, layers in found.items() for layer in layers)
    print(f"{args.output} written")


if __name__ == "__main__":
    run_cli(main)
