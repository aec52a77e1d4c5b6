"""The strength of layer responses: python tools/paper/layer_responses.py runs/plain56 runs/resnet56 --data /data/shards

Plots figure 7 of He et al. 2015: the standard deviation of each 3x3 layer's output after batch normalization, over the central
crops of a split's images, in the order of the layers (top) and sorted (bottom). The layers of residual models should respond less
than those of plain models, and the layers of deeper models less than those of shallower ones, because they change the signal
less.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import _path  # noqa: F401
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import nn
from tqdm import tqdm

from model.loading import load_model
from model.schemes import central_crop
from model.weights import ModelConfig
from pipeline import open_loader
from pipeline.cli import Parser, positive, run_cli
from pipeline.cores import cores_per_process
from pipeline.pixels.normalize import Normalization
from pipeline.spec import PRECISIONS, LoaderSpec
from pipeline.store.shards import Manifest


class Response(NamedTuple):
    """A 3x3 layer's response. layer: the name of its convolution. std: the standard deviation over all images, positions and
    channels."""

    layer: str
    std: float


@torch.inference_mode()
def responses(
    model: nn.Module, batches: Iterable[torch.Tensor], device: torch.device, autocast: Callable[[], Any]
) -> list[Response]:
    """The responses of a model's 3x3 layers to images (N, 3, H, W), in the order of the layers.

    He et al.: "The responses are the outputs of each 3x3 layer, after BN and before other nonlinearity (ReLU/addition)." The
    model is left in evaluation mode. autocast: returns the context manager in which the forward pass runs.
    """
    norms = norms_of_3x3_layers(model)
    sums = {layer: torch.zeros(3, dtype=torch.float64, device=device) for layer in norms}  # of 1, x and x squared
    hooks = [norm.register_forward_hook(_add_to(sums[layer])) for layer, norm in norms.items()]
    model.eval()
    try:
        for images in batches:
            with autocast():
                model(images)
    finally:
        for hook in hooks:
            hook.remove()
    found = []
    for layer, (count, total, squares) in ((layer, sums[layer].tolist()) for layer in norms):
        found.append(Response(layer, max(squares / count - (total / count) ** 2, 0.0) ** 0.5 if count else 0.0))
    return found


def norms_of_3x3_layers(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    """The batch normalization after each 3x3 convolution, by the convolution's name. convN is followed by bnN."""
    norms = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            parent, _, own = name.rpartition(".")
            norm = model.get_submodule(f"{parent}.{own.replace('conv', 'bn')}".lstrip("."))
            assert isinstance(norm, nn.BatchNorm2d)
            norms[name] = norm
    return norms


def _add_to(sums: torch.Tensor) -> Any:
    def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        # float32 is precise enough for sums over one image; sums over the data set are in float64.
        values = output.detach().float().flatten(1)
        sums[0] += values.numel()
        sums[1] += values.sum(1).double().sum()
        sums[2] += values.square().sum(1).double().sum()

    return hook


def model_input(spec: LoaderSpec, config: ModelConfig, split: str) -> LoaderSpec:
    """`spec` for the split's images as the model expects them: central crops in its image size, with its normalization."""
    normalization = Normalization.of(config.mean, config.std)
    spec = replace(spec, image_size=config.image_size, normalization=normalization, interpolation=config.interpolation)
    return spec.evaluation(split, geometry=central_crop(config))


def first_images(spec: LoaderSpec, count: int) -> Iterator[torch.Tensor]:
    """Batches (N, 3, H, W) of the first `count` images."""
    loader = open_loader(spec)
    for batch in tqdm(loader, total=min(len(loader), -(-count // spec.batch_size)), unit=" batches"):
        yield batch.images[:count]
        count -= len(batch.images)
        if count <= 0:
            break
    loader.close()


def draw(found: dict[str, list[Response]], path: Path) -> None:
    """Plot figure 7. found: responses by the model's name."""
    figure, axes = plt.subplots(2, 1, figsize=(9, 7), layout="constrained", sharex=True)
    for name, layers in found.items():
        deviations = [layer.std for layer in layers]
        numbers = range(1, len(layers) + 1)
        axes[0].plot(numbers, deviations, marker=".", label=name)
        axes[1].plot(numbers, sorted(deviations, reverse=True), marker=".", label=name)
    axes[0].set(ylabel="std", xlabel="layer (original)")
    axes[1].set(ylabel="std", xlabel="layer (sorted by magnitude)")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.set_ylim(0, None)
    axes[0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("weights", nargs="+", metavar="WEIGHTS_OR_RUN", help="models to compare: run folders or weight files")
    parser.add_argument("--data", required=True, help="folder or URL (s3://...) of shards")
    parser.add_argument("--split", default="val", help="split of the data (default: val)")
    parser.add_argument("--images", type=positive, default=1000, help="number of images from the split (default: 1000)")
    parser.add_argument("--output", type=Path, default=Path("figure7.png"), help="image file to write (default: figure7.png)")
    parser.add_argument("--csv", type=Path, help="CSV file to write, with the columns model, layer, std")
    parser.add_argument("--arch", help="architecture, for weights that do not name it")
    parser.add_argument("--batch-size", type=positive, default=128, help="default: 128")
    parser.add_argument(
        "--precision", default="no", choices=PRECISIONS, help="precision of the forward pass (default: no, float32)"
    )
    device_name = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device_name, help="torch device (default: cuda if available, else cpu)")
    args = parser.parse_args()
    classes = Manifest(args.data).classes
    device, dtype = torch.device(args.device), PRECISIONS[args.precision]

    def autocast() -> Any:
        return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    spec = LoaderSpec(args.data, batch_size=args.batch_size, dtype=dtype, device=args.device, threads=cores_per_process())
    found: dict[str, list[Response]] = {}
    for path in args.weights:
        model, config = load_model(path, args.arch, classes)
        model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = first_images(model_input(spec, config, args.split), args.images)
        found[path] = responses(model, images, device, autocast)
        deviations = [layer.std for layer in found[path]]
        print(f"{path}: {config.arch}, {len(deviations)} layers, mean std {sum(deviations) / len(deviations):.3f}", flush=True)
    draw(found, args.output)
    if args.csv:
        with args.csv.open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["model", "layer", "std"])
            writer.writerows([path, layer.layer, f"{layer.std:.6g}"] for path, layers in found.items() for layer in layers)
    print(f"{args.output} written")


if __name__ == "__main__":
    run_cli(main)
