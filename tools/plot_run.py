"""Pictures of a run: python tools/plot_run.py runs/latest --data /data/shards

Writes RUN/curves.png (training loss, validation error, both against epochs) and RUN/batch.png (training images as the net sees
them, but for the mean, which is added back).
"""

from __future__ import annotations

import json
from pathlib import Path

import _path  # noqa: F401
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from pipeline import open_loader
from pipeline.cli import Parser, run_cli
from pipeline.errors import UserError
from pipeline.plan.geometry import Geometry, choose_geometry
from pipeline.spec import LoaderSpec
from training.metrics import read_metrics


def plot_curves(metrics: Path, picture: Path) -> None:
    rows = read_metrics(metrics)
    train = [(float(row["epoch"]), float(row["train_loss"])) for row in rows if row["train_loss"]]
    val = [(float(row["epoch"]), 100 * (1 - float(row["val_top1"]))) for row in rows if row["val_top1"]]
    if not train and not val:
        raise UserError(f"{metrics}: holds no figures yet; let the run log first")
    figure, loss_axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    lines = [*loss_axis.plot(*zip(*train, strict=True), color="tab:blue", label="training loss")] if train else []
    loss_axis.set(xlabel="epoch", ylabel="training loss (cross-entropy)", ylim=(0, None))
    loss_axis.grid(alpha=0.3)
    if val:
        error_axis = loss_axis.twinx()
        lines += error_axis.plot(*zip(*val, strict=True), color="tab:red", marker="o", label="validation error")
        error_axis.set(ylabel="top-1 validation error, %", ylim=(0, 100))
        best = min(error for _, error in val)
        loss_axis.set_title(f"{metrics.parent.name}: lowest validation error {best:.1f} %")
    loss_axis.legend(lines, [str(line.get_label()) for line in lines], loc="upper right")
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def plot_batch(data: str, geometry: Geometry, size: int, picture: Path, rows: int = 4, columns: int = 8) -> None:
    spec = LoaderSpec(data, batch_size=rows * columns, image_size=size, geometry=geometry)
    loader = open_loader(spec)
    batch = next(iter(loader))
    pixels = batch.images.permute(0, 2, 3, 1).numpy() * loader.normalization.std + loader.normalization.mean
    figure, axes = plt.subplots(rows, columns, figsize=(columns * 1.5, rows * 1.7), layout="constrained")
    for axis, image, label in zip(axes.flat, pixels, batch.labels.tolist(), strict=True):
        axis.imshow(image.clip(0, 255).astype(np.uint8))
        axis.set_title(loader.classes[label], fontsize=8)
        axis.axis("off")
    figure.savefig(picture, dpi=120)
    plt.close(figure)
    loader.close()


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--data", required=True, help="folder or URL (s3://...) of shards")
    args = parser.parse_args()
    if not (args.run / "metrics.csv").is_file() or not (args.run / "model.safetensors").is_file():
        raise UserError(f"{args.run}: no finished run there; give the --output of a train.py that has ended")
    plot_curves(args.run / "metrics.csv", args.run / "curves.png")
    options = json.loads((args.run / "config.json").read_text())["arguments"]
    size = options["image_size"]
    plot_batch(
        args.data, choose_geometry(options["geometry"], options["scale"], size, options["area"]), size, args.run / "batch.png"
    )
    print(f"{args.run / 'curves.png'} and {args.run / 'batch.png'} written")


if __name__ == "__main__":
    run_cli(main)
