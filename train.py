"""Train a ResNet from shards: accelerate launch train.py --arch resnet50 --data /data/shards

One GPU, many GPUs or the CPU, as `accelerate` is told. Two processes on the CPU: ACCELERATE_USE_CPU=true torchrun
--nproc_per_node 2 train.py ... Batch size and learning rate are global: the run is the same for any number of processes.
--output gets metrics.csv, tensorboard/, checkpoints/{last,best} and, at the end, model.safetensors. A run that was stopped
anywhere goes on with --resume, at the exact step, with the same samples and the same draws.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from tqdm import tqdm

from model import ARCHS
from model.testing import score
from model.weights import Recipe, load_weights, save_weights
from pipeline import ENGINES, open_loader
from pipeline.errors import Parser, UserError, positive, run_cli
from pipeline.geometry import CentreCrop, Geometry, ScaleJitter, choose_geometry
from pipeline.loader import Loader
from pipeline.spec import CORRUPT, PRECISIONS, LoaderSpec
from training.checkpoint import load_checkpoint, save_checkpoint
from training.launch import check_launch, core_share
from training.metrics import Meter, MetricsFile
from training.schedule import SCHEDULES, learning_rate
from training.tuned import with_tuned

MOMENTUM = 0.9  # He et al. 2015, section 3.4
WAITING = 0.05  # share of the time spent waiting for data above which the profiler is named


@dataclass
class Progress:
    """Where a run stands; saved as JSON. errors: validation error after each validation. seconds: of training so far."""

    step: int = 0
    seconds: float = 0.0
    errors: list[float] = field(default_factory=list)


def parser() -> Parser:
    parse = Parser(__doc__)
    parse.add_argument("--data", required=True, help="folder or URL (s3://...) of shards, from tools/make_shards.py")
    parse.add_argument("--cache", type=Path, help="folder for copies of remote shards (CROPFEED_CACHE; ~/.cache/cropfeed)")
    parse.add_argument("--cache-gb", type=float, help="its bound (CROPFEED_CACHE_GB; 80 %% of the free disk)")
    parse.add_argument("--output", type=Path, help="folder of this run (default: runs/ARCH)")
    parse.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
    parse.add_argument("--arch", default="resnet50", help=", ".join(ARCHS))
    parse.add_argument("--epochs", type=positive, default=90)
    parse.add_argument("--batch-size", type=positive, default=256, help="global, over all processes")
    parse.add_argument("--accumulate", type=positive, default=1, help="parts that each batch is computed in, for less memory")
    parse.add_argument("--lr", type=float, default=0.1, help="for the global batch")
    parse.add_argument("--schedule", default="step", choices=SCHEDULES)
    parse.add_argument("--warmup", type=float, default=0.0, help="epochs of linear warm-up")
    parse.add_argument("--weight-decay", type=float, default=1e-4)
    parse.add_argument("--image-size", type=positive, default=224)
    parse.add_argument("--geometry", default="jitter", choices=("jitter", "rrc"), help="scale jitter, or random resized crops")
    parse.add_argument(
        "--scale", type=int, nargs=2, metavar=("LO", "HI"), help="of the short side, for jitter (256 480 at size 224)"
    )
    parse.add_argument("--order", default="full", choices=("full", "blocks"), help="shuffle all images, or blocks of shards")
    parse.add_argument("--block-shards", type=positive, default=8, help="shards in a block; two blocks should fit the cache")
    parse.add_argument("--corrupt", default="replace", choices=CORRUPT, help="what to do at an image that cannot be decoded")
    parse.add_argument("--mean", default="pixel", choices=("pixel", "channel"), help="what is subtracted")
    parse.add_argument("--seed", type=int, default=0)
    parse.add_argument("--mixed-precision", choices=PRECISIONS, help="default: what accelerate was told")
    parse.add_argument("--compile", action="store_true", help="torch.compile the model")
    parse.add_argument("--engine", default="auto", help=", ".join(("auto", *ENGINES)))
    parse.add_argument(
        "--threads", type=positive, help="decoding threads per process (default: as tuned; its share of the cores)"
    )
    parse.add_argument(
        "--prefetch", type=positive, help="batches made ahead (default: as tuned by profile_pipeline.py --tune; 2)"
    )
    parse.add_argument("--eval-every", type=positive, default=1, help="epochs between validations; the last epoch always has one")
    parse.add_argument("--log-every", type=positive, default=20, help="steps between rows of metrics.csv")
    parse.add_argument("--checkpoint-every", type=positive, default=500, help="steps between checkpoints within an epoch")
    return parse


def check_arguments(args: Any, output: Path) -> None:
    if args.arch not in ARCHS:
        raise UserError(f"unknown --arch {args.arch!r}; choose from {', '.join(ARCHS)}")
    if args.lr <= 0 or args.weight_decay < 0 or not 0 <= args.warmup < args.epochs:
        raise UserError("--lr must be positive, --weight-decay not negative, and --warmup shorter than --epochs")
    last = output / "checkpoints" / "last"
    if args.resume and not last.exists():
        raise UserError(f"{last}: no checkpoint to resume from; start without --resume")
    if not args.resume and output.exists() and any(output.iterdir()):
        raise UserError(f"{output}: exists already; continue it with --resume, or give another --output")


def open_loaders(args: Any, accelerator: Accelerator) -> tuple[Loader, Loader | None]:
    """The training loader, and the validation loader where the data has that split."""
    spec = LoaderSpec(
        args.data,
        batch_size=args.batch_size,
        order=args.order,
        block_shards=args.block_shards,
        image_size=args.image_size,
        geometry=choose_geometry(args.geometry, args.scale, args.image_size),
        seed=args.seed,
        normalization=args.mean,
        dtype=PRECISIONS.get(accelerator.mixed_precision, torch.float32),
        corrupt=args.corrupt,
        device=str(accelerator.device),
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        engine=args.engine,
        cache=args.cache,
        cache_gb=args.cache_gb,
    )
    if args.batch_size % (accelerator.num_processes * args.accumulate):
        raise UserError(f"--batch-size {args.batch_size} must be a multiple of processes x --accumulate")
    spec = with_tuned(spec, args.threads, args.prefetch)
    train_loader = open_loader(spec)
    has_val = "val" in train_loader.shards.manifest.splits
    return train_loader, open_loader(spec.evaluation()) if has_val else None


def profile_command(args: Any, precision: str) -> str:
    """The profiler's command for a run of these arguments."""
    command = ["python", "tools/profile_pipeline.py", args.data, "--arch", args.arch, "--precision", precision]
    default = parser().get_default
    for name in ("batch_size", "image_size", "geometry", "scale", "order", "engine", "threads", "prefetch", "cache", "cache_gb"):
        value = getattr(args, name)
        if value != default(name):
            command += [f"--{name.replace('_', '-')}", *(map(str, value) if name == "scale" else [str(value)])]
    return shlex.join(command)


def scale_of(geometry: Geometry) -> tuple[int, int] | None:
    return (geometry.low, geometry.high) if isinstance(geometry, ScaleJitter) else None


class Run:
    """One training run: what it is made of, and its steps."""

    def __init__(self, args: Any, accelerator: Accelerator, output: Path) -> None:
        self.args, self.accelerator, self.output = args, accelerator, output
        self.loader, self.val_loader = open_loaders(args, accelerator)
        spec, normalization = self.loader.spec, self.loader.normalization
        evaluation = spec.evaluation().geometry
        assert isinstance(evaluation, CentreCrop)
        self.recipe = Recipe(
            args.arch, self.loader.classes, spec.final_size, evaluation.short, normalization.mean, normalization.std
        )
        self.progress = Progress()
        self.rows, self.told_of_waiting = 0, False
        torch.manual_seed(args.seed)
        self.net = ARCHS[args.arch](num_classes=len(self.loader.classes)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.SGD(self.net.parameters(), args.lr, MOMENTUM, weight_decay=args.weight_decay)
        saved = self.restore() if args.resume else None  # before anything is written: it may refuse
        self.model, self.optimizer = accelerator.prepare(torch.compile(self.net) if args.compile else self.net, optimizer)
        if saved:
            self.optimizer.load_state_dict(saved["optimizer"])
            if accelerator.scaler is not None and saved["scaler"]:
                accelerator.scaler.load_state_dict(saved["scaler"])
        self.total_steps = args.epochs * len(self.loader)
        self.started = time.perf_counter() - self.progress.seconds
        if accelerator.is_main_process:
            print(
                f"engine {self.loader.engine}: {self.loader.why}; {spec.threads} threads, {spec.prefetch} batches ahead",
                flush=True,
            )
            output.mkdir(parents=True, exist_ok=True)
            self.metrics = MetricsFile(output / "metrics.csv", self.progress.step)
            config = {
                "command": sys.argv,
                "arguments": vars(args) | {"scale": scale_of(spec.geometry)},
                "precision": accelerator.mixed_precision,
                "processes": accelerator.num_processes,
                "engine": self.loader.engine,
            }
            (output / "config.json").write_text(json.dumps(config, indent=1, default=str))
        accelerator.wait_for_everyone()
        accelerator.init_trackers("tensorboard")

    def restore(self) -> dict[str, Any]:
        """Weights, place and progress of the last checkpoint; returns the optimizer's part. Refuses another net or other data."""
        path = self.output / "checkpoints" / "last"
        weights, header = load_weights(path / "model.safetensors")
        recipe = Recipe.from_header(header)
        if recipe is None or recipe.arch != self.args.arch:
            raise UserError(f"{path}: is a checkpoint of {recipe.arch if recipe else '?'}, not of --arch {self.args.arch}")
        if recipe.classes != self.loader.classes:
            raise UserError(
                f"{path}: was trained on {len(recipe.classes)} classes, {self.args.data} has {len(self.loader.classes)} "
                "(or others); resume with the same data"
            )
        saved, state = load_checkpoint(path)
        if state["batch_size"] != self.args.batch_size:
            raise UserError(f"{path}: was made with --batch-size {state['batch_size']}; resume with the same")
        self.loader.load_state_dict(state["loader"])
        self.net.load_state_dict(weights)
        self.progress = Progress(**state["progress"])
        return saved

    def save(self, best: bool = False) -> None:
        self.progress.seconds = time.perf_counter() - self.started
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            save_checkpoint(
                self.output / "checkpoints",
                self.progress.step,
                self.write_weights,
                {"optimizer": self.optimizer.state_dict(), "scaler": scaler.state_dict() if scaler else None},
                {"loader": self.loader.state_dict(), "progress": asdict(self.progress), "batch_size": self.args.batch_size},
                best,
            )

    def write_weights(self, path: Path) -> None:
        save_weights(path, self.net.state_dict(), self.recipe.header())

    def log(self, values: dict[str, float]) -> None:
        row = {
            "step": self.progress.step,
            "epoch": self.progress.step / len(self.loader),
            "seconds": time.perf_counter() - self.started,
        }
        if self.accelerator.is_main_process:
            self.metrics.write(row | values)
        self.accelerator.log(values, step=self.progress.step)

    def train(self) -> None:
        done, quiet = self.progress.step, not self.accelerator.is_main_process
        with tqdm(total=self.total_steps, initial=done, unit=" steps", disable=quiet) as bar:
            while self.loader.epoch < self.args.epochs:
                self.train_epoch(bar)
                self.tell_of_replaced(bar)
                best = False
                epoch = self.loader.epoch  # already the next one's number: how many are done
                if self.val_loader is not None and (epoch % self.args.eval_every == 0 or epoch == self.args.epochs):
                    best = self.validate(bar)
                self.save(best)
        if self.accelerator.is_main_process:
            self.write_weights(self.output / "model.safetensors")
        self.accelerator.end_training()

    def train_epoch(self, bar: Any) -> None:
        """The rest of the loader's epoch, with a row every --log-every steps and a checkpoint every --checkpoint-every."""
        args, progress = self.args, self.progress
        meter = Meter(self.accelerator.device)
        for batch in meter.timed(self.loader):
            rate = self.rate()
            meter.add(self.train_step(batch.images, batch.labels, rate))
            progress.step += 1
            bar.update()
            if progress.step % args.log_every == 0:
                row = meter.read(args.batch_size, self.accelerator.gather)
                self.log({"lr": rate} | row)
                self.tell_of_waiting(bar, row["wait_share"])
                bar.set_postfix_str(
                    f"loss {row['train_loss']:.3f}, {row['images_per_s']:.0f} images/s, waiting for data {row['wait_share']:.1%}"
                )
            # The epoch's end has a checkpoint of its own, after validation.
            if progress.step % args.checkpoint_every == 0 and progress.step % len(self.loader):
                self.save()

    def tell_of_waiting(self, bar: Any, share: float) -> None:
        """Name the profiler, once, if training waits for data; the first row does not count, as the loader starts in it."""
        self.rows += 1
        if share > WAITING and self.rows > 1 and not self.told_of_waiting:
            self.told_of_waiting = True
            if self.accelerator.is_main_process:
                command = profile_command(self.args, self.accelerator.mixed_precision)
                bar.write(f"waiting for data {share:.0%} of the time; this says what to change: {command}")

    def tell_of_replaced(self, bar: Any) -> None:
        """Say how many images stood in for corrupt ones since the start, over all processes, if any did."""
        count = torch.tensor(self.loader.replaced, device=self.accelerator.device)
        replaced = int(self.accelerator.reduce(count, "sum"))
        if replaced and self.accelerator.is_main_process:
            bar.write(f"epoch {self.loader.epoch}: {replaced} images replaced so far that could not be decoded")

    def rate(self) -> float:
        """The learning rate of the next step, taken at the step's middle so that neither end of a schedule is wasted."""
        args, progress = self.args, self.progress
        return learning_rate(
            args.schedule, args.lr, (progress.step + 0.5) / self.total_steps, args.warmup / args.epochs, progress.errors
        )

    def train_step(self, images: torch.Tensor, labels: torch.Tensor, rate: float) -> torch.Tensor:
        """One update from this process's part of a global batch; its mean loss, still on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        parts = self.args.accumulate
        mean = torch.zeros((), device=images.device)
        for part, targets in zip(images.chunk(parts), labels.chunk(parts), strict=True):
            with self.accelerator.accumulate(self.model):
                loss = F.cross_entropy(self.model(part), targets)
                self.accelerator.backward(loss)  # divides by the number of parts
                self.optimizer.step()
                self.optimizer.zero_grad()
            mean += loss.detach() / parts
        return mean

    def validate(self, bar: Any) -> bool:
        """Score the validation split; returns whether this is the lowest error so far."""
        assert self.val_loader is not None
        result = score(
            self.net,
            ((batch.images, batch.labels) for batch in self.val_loader),
            len(self.loader.classes),
            self.accelerator.device,
            self.accelerator.autocast,
            lambda counts: self.accelerator.reduce(counts, "sum"),
        )
        self.log({"val_top1": result.top1_rate, "val_top5": result.top5_rate})
        if self.accelerator.is_main_process:
            bar.write(
                f"epoch {self.loader.epoch}: top-1 {result.top1_rate:.2%}, top-5 {result.top5_rate:.2%} of {result.images} images"
            )
        errors = self.progress.errors
        errors.append(1 - result.top1_rate)
        return errors[-1] <= min(errors)


def main() -> None:
    args = parser().parse_args()
    output = (args.output or Path("runs") / args.arch).absolute()
    check_arguments(args, output)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.accumulate,
        log_with="tensorboard",
        project_config=ProjectConfiguration(str(output), str(output)),
    )
    check_launch(accelerator.num_processes)
    if accelerator.device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    elif accelerator.device.type == "cpu":
        torch.set_num_threads(core_share())  # accelerate launch and torchrun set OMP_NUM_THREADS=1 unless told otherwise
    run = Run(args, accelerator, output)
    if accelerator.is_main_process and output.parent.name == "runs":
        latest = output.parent / "latest"
        latest.unlink(missing_ok=True)
        latest.symlink_to(output.name)
    run.train()


if __name__ == "__main__":
    run_cli(main)
