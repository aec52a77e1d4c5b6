"""Top-1 and top-5 of a net on a split: python tools/evaluate.py runs/latest --data /data/shards

WEIGHTS_OR_RUN is a run's folder (its model.safetensors, or its last checkpoint while it still trains), a .safetensors or a .pth
file. A file of ours knows its architecture and preprocessing. Any other is taken for torchvision's: give --arch; images get
short side 256, centre crop 224 and ImageNet's channel mean and deviation.
"""

from __future__ import annotations

import csv
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import _path  # noqa: F401
import torch
from tqdm import tqdm

from model import ARCHS, ResNet
from model.loading import load_net, weights_file
from model.testing import Score, score
from model.weights import Recipe
from pipeline import open_loader
from pipeline.augment import Normalization
from pipeline.errors import Parser, positive, run_cli
from pipeline.geometry import CentreCrop
from pipeline.shards import Manifest
from pipeline.spec import PRECISIONS, LoaderSpec
from training.launch import core_share


def evaluate(net: ResNet, recipe: Recipe, args: Any) -> Score:
    spec = LoaderSpec(
        args.data,
        batch_size=args.batch_size,
        image_size=recipe.image_size,
        normalization=Normalization.of(recipe.mean, recipe.std),
        dtype=PRECISIONS[args.precision],
        device=args.device,
        engine=args.engine,
        threads=args.threads,
        cache=args.cache,
        cache_gb=args.cache_gb,
    ).evaluation(args.split, geometry=CentreCrop(recipe.eval_short))
    loader = open_loader(spec)
    device = torch.device(args.device)
    net = net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    batches = ((batch.images, batch.labels) for batch in tqdm(loader, unit=" batches"))

    def autocast() -> Any:
        return nullcontext() if spec.dtype == torch.float32 else torch.autocast(device.type, spec.dtype)

    return score(net, batches, len(loader.classes), device, autocast)


def write_tables(result: Score, classes: list[str], per_class: Path | None, confusion: Path | None) -> None:
    """per_class: a row a class: name, images, its top-1 and top-5 shares. confusion: rows are labels, columns predictions."""
    counts = result.confusion
    if per_class:
        with per_class.open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["class", "images", "top1", "top5"])
            for index, name in enumerate(classes):
                images = int(counts[index].sum())
                shares = [int(hits) / images if images else "" for hits in (counts[index, index], result.top5[index])]
                writer.writerow([name, images, *shares])
    if confusion:
        with confusion.open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["label \\ prediction", *classes])
            writer.writerows([name, *row] for name, row in zip(classes, counts.tolist(), strict=True))


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("weights", type=Path, metavar="WEIGHTS_OR_RUN")
    parser.add_argument("--data", required=True, help="folder or URL (s3://...) of shards")
    parser.add_argument("--cache", type=Path, help="folder for copies of remote shards (CROPFEED_CACHE; ~/.cache/cropfeed)")
    parser.add_argument("--cache-gb", type=float, help="its bound (CROPFEED_CACHE_GB; 80 %% of the free disk)")
    parser.add_argument("--split", default="val")
    parser.add_argument("--json", type=Path, help="write top1, top5 and images there")
    parser.add_argument("--per-class", type=Path, help="write a CSV with a row a class there")
    parser.add_argument("--confusion", type=Path, help="write the confusion matrix as CSV there")
    parser.add_argument("--arch", help="for weights that do not name it: " + ", ".join(ARCHS))
    parser.add_argument("--batch-size", type=positive, default=256)
    parser.add_argument("--precision", default="no", choices=PRECISIONS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--threads", type=positive, default=core_share())
    args = parser.parse_args()
    classes = Manifest(args.data).classes
    net, recipe = load_net(weights_file(args.weights), args.arch, classes)
    result = evaluate(net, recipe, args)
    figures = {"top1": result.top1_rate, "top5": result.top5_rate, "images": result.images}
    write_tables(result, classes, args.per_class, args.confusion)
    if args.json:
        args.json.write_text(json.dumps(figures) + "\n")
    print(f"{args.weights}: top-1 {figures['top1']:.2%}, top-5 {figures['top5']:.2%} of {figures['images']} {args.split} images")


if __name__ == "__main__":
    run_cli(main)
