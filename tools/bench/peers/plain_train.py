"""The training script that people write: PyTorch's DataLoader over a folder of images, Pillow behind it, and a loop.

    cd tools && python -m tools.bench.peers.plain_train --data IMAGES --output RUN --arch resnet18 --epochs 16

For bench_accuracy.py, which gives it the hyper-parameters of one of train.py's recipes; options have train.py's names. Without
further ones it is what most scripts are: float32, contiguous layout, the final picture size throughout. --precision,
--channels-last, --compile, --start-size and --ramp give the net what our recipes give it: then only the data feed differs.

IMAGES holds train/ and val/, with a folder for each class. Transforms are torchvision's, which need not be installed: Resize to a
random short side and RandomCrop (or RandomResizedCrop), RandomHorizontalFlip, ToTensor, Normalize. Images are divided by the
deviation, which train.py does not do: to a net that begins with a convolution and a batch normalization it is all one.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm import tqdm

from model import ARCHS
from pipeline.cli import Parser, positive, run_cli
from pipeline.errors import UserError
from pipeline.plan.sampling import EVAL_SHORT, SCALE, short_at
from tools.bench.peers.plain_pictures import (
    ImageFolder,
    Transform,
    jitter,
    resized_crop,
    to_tensor,
    training_transform,
    validation_transform,
)
from training.metrics import MetricsFile
from training.options import make_sizes


def size_at(args: argparse.Namespace, epoch: int) -> int:
    """The picture size of an epoch, pixels."""
    sizes = make_sizes(argparse.Namespace(**vars(args), iterations=None), 1)
    return sizes if isinstance(sizes, int) else next(size for first, size in reversed(sizes) if first <= epoch)


def transform_at(args: argparse.Namespace, size: int) -> Transform:
    """Training's transform at a picture size: --scale is meant for --image-size, others have it in proportion."""
    if args.geometry == "rrc":
        low, high = args.area
        return partial(training_transform, crop=partial(resized_crop, size=size, low=low, high=high))
    low, high = (short_at(short, size, args.image_size) for short in args.scale or (short_at(s, args.image_size) for s in SCALE))
    return partial(training_transform, crop=partial(jitter, size=size, low=low, high=high))


def evaluation_transform(args: argparse.Namespace) -> Transform:
    """Validation's transform: a short side of 256 for crops of 224, others in proportion."""
    size = args.eval_size or args.image_size
    return partial(validation_transform, size=size, short=short_at(short_at(EVAL_SHORT, args.image_size), size, args.image_size))


def learning_rate(step: int, schedule: str, warmup: float, steps: int) -> float:
    """Share of --lr at the middle of a step: linear from 0 in the warm-up, then as scheduled to 0. warmup, steps: in steps."""
    if step + 0.5 < warmup:
        return (step + 0.5) / warmup
    done = (step + 0.5 - warmup) / (steps - warmup)
    return 1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def make_optimizer(net: nn.Module, args: argparse.Namespace) -> torch.optim.SGD:
    """SGD with momentum; with --no-norm-decay, weight decay on the matrices and filters alone."""
    parameters = list(net.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [one for one in parameters if one.ndim > 1]},
        {
            "params": [one for one in parameters if one.ndim <= 1],
            "weight_decay": 0.0 if args.no_norm_decay else args.weight_decay,
        },
    ]
    return torch.optim.SGD(groups, args.lr, args.momentum, weight_decay=args.weight_decay)


def average(decay: float, averages: Any, weights: Any, count: torch.Tensor) -> None:
    """For AveragedModel: the moving average in place, its decay warming up as train.py's does. count: of updates so far."""
    get_ema_multi_avg_fn(min(decay, (1 + int(count)) / (10 + int(count))))(averages, weights, count)


class Trainer:
    """A net, its loaders and its optimizer."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        random.seed(args.seed)
        torch.manual_seed(args.seed)
        self.train_set = ImageFolder(args.data / "train", to_tensor)
        val_set = ImageFolder(args.data / "val", evaluation_transform(args))
        if val_set.classes != self.train_set.classes:
            raise UserError(f"{args.data}: train/ and val/ hold different classes")
        common: dict[str, Any] = {"num_workers": args.workers, "pin_memory": self.device.type == "cuda"}
        # Workers start anew in each epoch, the default: those that persist would keep the first epoch's transform.
        self.train_loader = DataLoader(self.train_set, args.batch_size, shuffle=True, drop_last=True, **common)
        self.val_loader = DataLoader(val_set, args.batch_size, **common)
        if not len(self.train_loader):
            raise UserError(f"{args.data / 'train'}: {len(self.train_set)} images do not fill a batch of {args.batch_size}")
        layout = torch.channels_last if args.channels_last else torch.contiguous_format
        self.layout = {"memory_format": layout}
        self.net = ARCHS[args.arch](num_classes=len(self.train_set.classes)).to(self.device, **self.layout)  # type: ignore[call-overload]
        self.model = torch.compile(self.net, mode=args.compile) if args.compile else self.net
        self.average = None
        if args.ema:
            self.average = AveragedModel(self.net, multi_avg_fn=partial(average, args.ema), use_buffers=True)
        self.optimizer = make_optimizer(self.net, args)
        per_epoch = len(self.train_loader)
        steps = {"warmup": args.warmup * per_epoch, "steps": args.epochs * per_epoch}
        share = partial(learning_rate, schedule=args.schedule, **steps)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, share)

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.precision == "bf16")

    def moved(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        images = images.to(self.device, non_blocking=True, **self.layout)  # type: ignore[call-overload]
        return images, labels.to(self.device, non_blocking=True)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """One update; its mean loss."""
        images, labels = self.moved(images, labels)
        with self.autocast():
            loss = F.cross_entropy(self.model(images), labels, label_smoothing=self.args.label_smoothing)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.net)
        return loss.detach()

    @torch.no_grad()
    def validate(self) -> float:
        """Share of the validation images whose highest logit is their label's."""
        net: Any = self.average or self.model
        net.eval()
        right = 0
        for images, labels in self.val_loader:
            images, labels = self.moved(images, labels)
            with self.autocast():
                logits = net(images).float()
                if self.args.flip_test:
                    logits = logits + net(images.flip(3)).float()
            right += int((logits.argmax(1) == labels).sum())
        self.net.train()
        return right / len(self.val_loader.dataset)  # type: ignore[arg-type]


def train(args: argparse.Namespace) -> None:
    """The whole run; writes OUTPUT/metrics.csv and config.json, which tools/report.py reads, as train.py does, and model.pt."""
    trainer = Trainer(args)
    args.output.mkdir(parents=True, exist_ok=True)
    made = {"command": sys.argv, "arguments": vars(args), "precision": args.precision, "engine": "DataLoader"}
    (args.output / "config.json").write_text(json.dumps(made, default=str))
    metrics = MetricsFile(args.output / "metrics.csv", 0)
    per_epoch, step, losses = len(trainer.train_loader), 0, []
    began = time.perf_counter()

    def log(values: dict[str, float]) -> None:
        metrics.write({"step": step, "epoch": step / per_epoch, "seconds": time.perf_counter() - began, **values})

    bar = tqdm(total=args.epochs * per_epoch, unit=" steps")
    for epoch in range(args.epochs):
        trainer.train_set.transform = transform_at(args, size_at(args, epoch))
        for images, labels in trainer.train_loader:
            rate = trainer.optimizer.param_groups[0]["lr"]
            losses.append(trainer.step(images, labels).item())
            step += 1
            bar.update()
            if step % args.log_every == 0:
                log({"lr": rate, "train_loss": sum(losses) / len(losses)})
                losses.clear()
        if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
            top1 = trainer.validate()
            log({"val_top1": top1})
            bar.write(f"epoch {epoch + 1}: top-1 {top1:.2%}")
    bar.close()
    torch.save(trainer.net.state_dict(), args.output / "model.pt")


def parser() -> Parser:
    parse = Parser(__doc__)
    parse.add_argument("--data", required=True, type=Path)
    parse.add_argument("--output", required=True, type=Path)
    parse.add_argument("--arch", default="resnet18", choices=ARCHS, metavar="NET")
    parse.add_argument("--epochs", type=positive, default=90)
    parse.add_argument("--batch-size", type=positive, default=256)
    parse.add_argument("--lr", type=float, default=0.1)
    parse.add_argument("--momentum", type=float, default=0.9)
    parse.add_argument("--schedule", default="cosine", choices=("cosine", "linear"))
    parse.add_argument("--warmup", type=float, default=0.0, help="epochs")
    parse.add_argument("--weight-decay", type=float, default=1e-4)
    parse.add_argument("--no-norm-decay", action="store_true", help="no weight decay on batch normalization and biases")
    parse.add_argument("--label-smoothing", type=float, default=0.0)
    parse.add_argument("--ema", type=float, help="decay of the weights' exponential moving average, which is validated then")
    parse.add_argument("--image-size", type=positive, default=224)
    parse.add_argument("--start-size", type=positive, help="progressive resizing: the first epochs' picture size")
    parse.add_argument("--ramp", type=float, nargs=2, metavar=("FROM", "TO"), help="as train.py's")
    parse.add_argument("--eval-size", type=positive, help="of the validation crop (that of training)")
    parse.add_argument(
        "--flip-test", action="store_true", help="validate with the sum of an image's and its mirror image's logits"
    )
    parse.add_argument("--geometry", default="jitter", choices=("jitter", "rrc"))
    parse.add_argument("--scale", type=positive, nargs=2, metavar=("LO", "HI"), help="of the short side (256 480 at 224)")
    parse.add_argument("--area", type=float, nargs=2, default=(0.08, 1.0), metavar=("LO", "HI"), help="for rrc (0.08 1)")
    parse.add_argument("--precision", default="no", choices=("no", "bf16"))
    parse.add_argument("--channels-last", action="store_true")
    parse.add_argument("--compile", nargs="?", const="default", metavar="MODE", help="torch.compile (default)")
    parse.add_argument("--workers", type=int, default=2, help="of the DataLoader (2)")
    parse.add_argument("--threads", type=positive, help="of the net, on a CPU (torch's default)")
    parse.add_argument("--seed", type=int, default=0)
    parse.add_argument("--eval-every", type=positive, default=1)
    parse.add_argument("--log-every", type=positive, default=20)
    return parse


def main() -> None:
    args = parser().parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    train(args)


if __name__ == "__main__":
    run_cli(main)
