"""A typical training script: a PyTorch DataLoader that reads a folder of images with Pillow, and a training loop.

    python -m tools.bench.peers.plain_train '{"data": "IMAGES", "arch": "resnet18", "epochs": 16}' --output RUN

bench_accuracy.py runs it with the hyper-parameters of one of train.py's recipes. Its options have the names of train.py's. By
default it trains as most scripts do: in float32, with contiguous layout, at the final image size throughout. `precision`,
`channels_last`, `compile`, `start_size` and `ramp` do for the model what our recipes do, so that only the input differs.

`data` contains train/ and val/, with a folder for each class. The transforms are those of torchvision, which need not be
installed: Resize to a random short side and RandomCrop (or RandomResizedCrop), RandomHorizontalFlip, ToTensor, Normalize. Unlike
train.py, Normalize also divides by the standard deviation. That makes no difference to a model that begins with a convolution and
a batch normalization.
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
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
from pipeline.cli import Parser, run_cli
from pipeline.errors import UserError
from pipeline.plan.sampling import EVAL_SHORT, SCALE, short_at
from tools.bench.peers.plain_images import (
    ImageFolder,
    Transform,
    jitter,
    resized_crop,
    to_tensor,
    training_transform,
    validation_transform,
)
from training.metrics import MetricsFile
from training.options import TrainOptions, make_sizes


@dataclass(frozen=True)
class PlainOptions:
    """What to train, and how. Fields mean the same as train.py's options of these names. precision: "no" or "bf16". workers:
    number of the DataLoader's workers. threads: number of the model's threads on a CPU, None for torch's default."""

    data: Path
    arch: str = "resnet18"
    epochs: int = 90
    batch_size: int = 256
    lr: float = 0.1
    momentum: float = 0.9
    schedule: str = "cosine"
    warmup: float = 0.0
    weight_decay: float = 1e-4
    no_norm_decay: bool = False
    label_smoothing: float = 0.0
    ema: float | None = None
    image_size: int = 224
    start_size: int | None = None
    ramp: tuple[float, float] | None = None
    eval_size: int | None = None
    flip_test: bool = False
    geometry: str = "jitter"
    scale: tuple[int, int] | None = None
    area: tuple[float, float] = (0.08, 1.0)
    precision: str = "no"
    channels_last: bool = False
    compile: str | None = None
    seed: int = 0
    eval_every: int = 1
    log_every: int = 20
    workers: int = 2
    threads: int | None = None

    @staticmethod
    def of(text: str) -> PlainOptions:
        """The options in JSON, which has no tuples."""
        given: dict[str, Any] = json.loads(text)
        values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        return PlainOptions(**values | {"data": Path(given["data"])})

    def json(self) -> str:
        return json.dumps(asdict(self), default=str)


def size_at(options: PlainOptions, epoch: int) -> int:
    """The image size in an epoch, pixels."""
    start, end = options.start_size, options.image_size
    resized = TrainOptions(data="", epochs=options.epochs, image_size=end, start_size=start, ramp=options.ramp)
    sizes = make_sizes(resized, 1)
    return sizes if isinstance(sizes, int) else next(size for first, size in reversed(sizes) if first <= epoch)


def transform_at(options: PlainOptions, size: int) -> Transform:
    """The training transform at an image size. `scale` applies to `image_size`; for other sizes it is scaled in proportion."""
    if options.geometry == "rrc":
        low, high = options.area
        return partial(training_transform, crop=partial(resized_crop, size=size, low=low, high=high))
    scale = options.scale or tuple(short_at(short, options.image_size) for short in SCALE)
    shortest, longest = (short_at(short, size, options.image_size) for short in scale)
    return partial(training_transform, crop=partial(jitter, size=size, low=shortest, high=longest))


def evaluation_transform(options: PlainOptions) -> Transform:
    """The validation transform: a short side of 256 for crops of 224, and in proportion for other crops."""
    trained = options.image_size
    size = options.eval_size or trained
    return partial(validation_transform, size=size, short=short_at(short_at(EVAL_SHORT, trained), size, trained))


def learning_rate(step: int, schedule: str, warmup: float, steps: int) -> float:
    """The factor of `lr` in the middle of a step: it rises linearly from 0 in the warm-up, then falls to 0 as scheduled.

    warmup, steps: length of the warm-up and of the run, in steps.
    """
    if step + 0.5 < warmup:
        return (step + 0.5) / warmup
    done = (step + 0.5 - warmup) / (steps - warmup)
    return 1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def make_optimizer(model: nn.Module, options: PlainOptions) -> torch.optim.SGD:
    """SGD with momentum. With `no_norm_decay`, weight decay applies only to parameters of two or more dimensions."""
    parameters, decay = list(model.parameters()), 0.0 if options.no_norm_decay else options.weight_decay
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in parameters if parameter.ndim > 1]},
        {"params": [parameter for parameter in parameters if parameter.ndim <= 1], "weight_decay": decay},
    ]
    return torch.optim.SGD(groups, options.lr, options.momentum, weight_decay=options.weight_decay)


def average(decay: float, averages: Any, weights: Any, count: torch.Tensor) -> None:
    """For AveragedModel: update the moving average in place; the decay warms up as in train.py. count: updates so far."""
    get_ema_multi_avg_fn(min(decay, (1 + int(count)) / (10 + int(count))))(averages, weights, count)


class Trainer:
    """A model, its loaders and its optimizer."""

    def __init__(self, options: PlainOptions) -> None:
        self.options = options
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        random.seed(options.seed)
        torch.manual_seed(options.seed)
        self.train_set, self.train_loader, self.val_loader = self._open_data()
        self.layout = {"memory_format": torch.channels_last if options.channels_last else torch.contiguous_format}
        model = ARCHS[options.arch](num_classes=len(self.train_set.classes))
        self.model: nn.Module = model.to(self.device, **self.layout)  # type: ignore[call-overload]
        self.compiled: Any = torch.compile(self.model, mode=options.compile) if options.compile else self.model
        self.average = None
        if options.ema:
            self.average = AveragedModel(self.model, multi_avg_fn=partial(average, options.ema), use_buffers=True)
        self.optimizer = make_optimizer(self.model, options)
        per_epoch = len(self.train_loader)
        warmup, steps = options.warmup * per_epoch, options.epochs * per_epoch
        share = partial(learning_rate, schedule=options.schedule, warmup=warmup, steps=steps)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, share)

    def _open_data(self) -> tuple[ImageFolder, DataLoader[Any], DataLoader[Any]]:
        """The training images, the training loader and the validation loader."""
        data, batch_size = self.options.data, self.options.batch_size
        train_set = ImageFolder(data / "train", to_tensor)
        val_set = ImageFolder(data / "val", evaluation_transform(self.options))
        if val_set.classes != train_set.classes:
            raise UserError(f"{data}: train/ and val/ contain different classes")
        common: dict[str, Any] = {"num_workers": self.options.workers, "pin_memory": self.device.type == "cuda"}
        # By default new workers start in each epoch. Persistent workers would keep the first epoch's transform.
        train_loader = DataLoader(train_set, batch_size, shuffle=True, drop_last=True, **common)
        if not len(train_loader):
            raise UserError(f"{data / 'train'}: {len(train_set)} images do not fill a batch of {batch_size}")
        return train_set, train_loader, DataLoader(val_set, batch_size, **common)

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.precision == "bf16")

    def moved(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        images = images.to(self.device, non_blocking=True, **self.layout)  # type: ignore[call-overload]
        return images, labels.to(self.device, non_blocking=True)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Make one update; returns its mean loss."""
        images, labels = self.moved(images, labels)
        with self.autocast():
            loss = F.cross_entropy(self.compiled(images), labels, label_smoothing=self.options.label_smoothing)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        return loss.detach()

    @torch.no_grad()
    def validate(self) -> float:
        """Top-1 accuracy on the validation images, 0..1."""
        model: Any = self.average or self.compiled
        model.eval()
        right = 0
        for images, labels in self.val_loader:
            images, labels = self.moved(images, labels)
            with self.autocast():
                logits = model(images).float()
                if self.options.flip_test:
                    logits = logits + model(images.flip(3)).float()
            right += int((logits.argmax(1) == labels).sum())
        self.model.train()
        return right / len(self.val_loader.dataset)  # type: ignore[arg-type]


def train(options: PlainOptions, output: Path) -> None:
    """The whole run. Writes model.pt to OUTPUT, and metrics.csv and config.json, which tools/report.py can read."""
    trainer = Trainer(options)
    output.mkdir(parents=True, exist_ok=True)
    arguments = asdict(options) | {"output": output}
    made = {"command": sys.argv, "arguments": arguments, "precision": options.precision, "engine": "DataLoader"}
    (output / "config.json").write_text(json.dumps(made, default=str))
    metrics = MetricsFile(output / "metrics.csv", 0)
    per_epoch, step, losses = len(trainer.train_loader), 0, []
    began = time.perf_counter()

    def log(values: dict[str, float]) -> None:
        metrics.write({"step": step, "epoch": step / per_epoch, "seconds": time.perf_counter() - began, **values})

    bar = tqdm(total=options.epochs * per_epoch, unit=" steps")
    for epoch in range(options.epochs):
        trainer.train_set.transform = transform_at(options, size_at(options, epoch))
        for images, labels in trainer.train_loader:
            rate = trainer.optimizer.param_groups[0]["lr"]
            losses.append(trainer.step(images, labels).item())
            step += 1
            bar.update()
            if step % options.log_every == 0:
                log({"lr": rate, "train_loss": sum(losses) / len(losses)})
                losses.clear()
        if (epoch + 1) % options.eval_every == 0 or epoch + 1 == options.epochs:
            top1 = trainer.validate()
            log({"val_top1": top1})
            bar.write(f"epoch {epoch + 1}: top-1 {top1:.2%}")
    bar.close()
    torch.save(trainer.model.state_dict(), output / "model.pt")


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("options", metavar="OPTIONS", help="PlainOptions as JSON")
    parser.add_argument("--output", required=True, type=Path, help="folder for this run")
    args = parser.parse_args()
    options = PlainOptions.of(args.options)
    if options.threads:
        torch.set_num_threads(options.threads)
    train(options, args.output)


if __name__ == "__main__":
    run_cli(main)
