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
from model.loading import initial_weights
from model.testing import score
from model.weights import Recipe, load_weights, save_weights
from pipeline import open_loader
from pipeline.errors import UserError, run_cli
from pipeline.geometry import CentreCrop, Geometry, ScaleJitter, choose_geometry
from pipeline.loader import Loader
from pipeline.spec import PRECISIONS, LoaderSpec
from training.checkpoint import load_checkpoint, save_checkpoint
from training.launch import check_launch, core_share
from training.metrics import Meter, MetricsFile
from training.options import make_schedule, parse_arguments, parser
from training.tuned import with_tuned

WAITING = 0.05  # share of the time spent waiting for data above which the profiler is named


@dataclass
class Progress:
    """Where a run stands; saved as JSON. errors: validation error after each validation. seconds: of training so far."""

    step: int = 0
    seconds: float = 0.0
    errors: list[float] = field(default_factory=list)


def check_output(args: Any, output: Path) -> None:
    """Raise UserError where there is nothing to resume, or a run that a new one would overwrite."""
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
        alpha_std=args.alpha_std,
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
    if args.schedule == "plateau" and not has_val:
        raise UserError(f"{args.data}: has no split val, whose error --schedule plateau needs; take another schedule")
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
        optimizer = torch.optim.SGD(self.net.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay)
        saved = None
        if args.resume:
            saved = self.restore()  # before anything is written: it may refuse
        elif args.weights:
            taken = initial_weights(args.weights, args.arch, self.net, self.loader.classes)
            accelerator.print(taken, flush=True)
        self.model, self.optimizer = accelerator.prepare(torch.compile(self.net) if args.compile else self.net, optimizer)
        if saved:
            self.optimizer.load_state_dict(saved["optimizer"])
            if accelerator.scaler is not None and saved["scaler"]:
                accelerator.scaler.load_state_dict(saved["scaler"])
        self.schedule = make_schedule(args, len(self.loader))
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
        steps, quiet = self.schedule.steps, not self.accelerator.is_main_process
        with tqdm(total=steps, initial=self.progress.step, unit=" steps", disable=quiet) as bar:
            while self.progress.step < steps:
                self.train_epoch(bar)
                self.tell_of_replaced(bar)
                best = False
                is_due = self.loader.epoch % self.args.eval_every == 0  # already the next epoch's number: how many are done
                if self.val_loader is not None and (is_due or self.progress.step == steps):
                    best = self.validate(bar)
                self.save(best)
        if self.accelerator.is_main_process:
            self.write_weights(self.output / "model.safetensors")
        self.accelerator.end_training()

    def train_epoch(self, bar: Any) -> None:
        """The rest of the loader's epoch, or of the run, with a row every --log-every steps and a checkpoint every
        --checkpoint-every.
        """
        args, progress, steps_per_epoch = self.args, self.progress, len(self.loader)
        meter = Meter(self.accelerator.device)
        for batch in meter.timed(self.loader):
            rate = self.schedule.rate(progress.step, progress.errors)
            meter.add(*self.train_step(batch.images, batch.labels, rate))
            progress.step += 1
            bar.update()
            if progress.step % args.log_every == 0:
                row = meter.read(args.batch_size, self.accelerator.gather)
                self.log({"lr": rate} | row)
                self.tell_of_waiting(bar, row["wait_share"])
                bar.set_postfix_str(
                    f"loss {row['train_loss']:.3f}, {row['images_per_s']:.0f} images/s, waiting for data {row['wait_share']:.1%}"
                )
            # The ends of epoch and run have a checkpoint of their own, after validation.
            if progress.step % steps_per_epoch == 0:
                continue  # to the loader's own end of the epoch
            if progress.step == self.schedule.steps:
                return
            if progress.step % args.checkpoint_every == 0:
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

    def train_step(self, images: torch.Tensor, labels: torch.Tensor, rate: float) -> tuple[torch.Tensor, torch.Tensor]:
        """One update from this process's part of a global batch; its mean loss and top-1 share, still on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        parts = self.args.accumulate
        mean, top1 = torch.zeros(2, device=images.device)
        for part, targets in zip(images.chunk(parts), labels.chunk(parts), strict=True):
            with self.accelerator.accumulate(self.model):
                logits = self.model(part)
                loss = F.cross_entropy(logits, targets)
                self.accelerator.backward(loss)  # divides by the number of parts
                self.optimizer.step()
                self.optimizer.zero_grad()
            mean += loss.detach() / parts
            top1 += (logits.detach().argmax(1) == targets).float().mean() / parts
        return mean, top1

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
            epoch = f"{self.progress.step / len(self.loader):.4g}"
            bar.write(f"epoch {epoch}: top-1 {result.top1_rate:.2%}, top-5 {result.top5_rate:.2%} of {result.images} images")
        errors = self.progress.errors
        errors.append(1 - result.top1_rate)
        return errors[-1] <= min(errors)


def main() -> None:
    args = parse_arguments(__doc__, sys.argv[1:])
    output = (args.output or Path("runs") / args.arch).absolute()
    check_output(args, output)
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
