"""Train a ResNet from shards: accelerate launch train.py --arch resnet50 --data /data/shards

One GPU, many GPUs or the CPU, as `accelerate` is told. Two processes on the CPU: ACCELERATE_USE_CPU=true torchrun
--nproc_per_node 2 train.py ... Batch size and learning rate are global: the run is the same for any number of processes.
--output gets config.json, metrics.csv, tensorboard/, checkpoints/{last,best} and, at the end, model.safetensors. A run that was
stopped anywhere goes on with --resume, at the exact step, with the same samples and the same draws. SIGTERM saves, then stops.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from tqdm import tqdm

from model.loading import initial_weights
from model.testing import score
from model.weights import ModelConfig, load_weights, save_weights
from pipeline.cli import run_cli
from pipeline.errors import UserError
from training.checkpoint import load_checkpoint, save_checkpoint
from training.folder import check_output, write_config
from training.launch import check_launch, cores_per_process, rejoin_process_group, terminate_with_launcher
from training.learner import Learner
from training.loaders import model_config_of, open_loaders, profile_command
from training.metrics import Meter, MetricsFile, NonFinite
from training.options import make_schedule, parse_arguments
from training.stopping import Stopped, StopRequest
from training.trackers import make_trackers, start_trackers

WAITING = 0.05  # share of the time spent waiting for data above which the profiler is named
SETTINGS = ("batch_size", "optimizer", "no_norm_decay", "ema")  # that a checkpoint's state is made for


@dataclass
class Progress:
    """Where a run stands; saved as JSON. errors: validation error after each validation. seconds: of training so far. validated:
    the step of the last validation."""

    step: int = 0
    seconds: float = 0.0
    errors: list[float] = field(default_factory=list)
    validated: int = 0


class Run:
    """One training run: what it is made of, and its steps."""

    def __init__(self, args: Any, accelerator: Accelerator, output: Path, resumes: bool) -> None:
        self.args, self.accelerator, self.output = args, accelerator, output
        self.loader, self.val_loader = open_loaders(args, accelerator)
        self.recipe = model_config_of(args, self.loader)
        self.progress = Progress()
        self.rows, self.told_of_waiting = 0, False
        self.learner = Learner(args, accelerator, self.loader)
        saved = None
        if resumes:
            saved = self.restore()  # before anything is written: it may refuse
        elif args.weights:
            taken = initial_weights(args.weights, args.arch, self.learner.net, self.loader.classes)
            accelerator.print(taken, flush=True)
        self.learner.start(self.loader, saved)
        self.schedule = make_schedule(args, len(self.loader))
        self.not_finite = NonFinite(accelerator.device)
        self.started = time.perf_counter() - self.progress.seconds
        run_id = ""  # the main process alone writes to trackers
        if accelerator.is_main_process:
            loader, spec = self.loader, self.loader.spec
            print(f"engine {loader.engine}: {loader.why}; {spec.threads} threads, {spec.prefetch} batches ahead", flush=True)
            output.mkdir(parents=True, exist_ok=True)
            self.metrics = MetricsFile(output / "metrics.csv", self.progress.step)
            run_id = write_config(output, args, accelerator, loader, self.progress.step)
        accelerator.wait_for_everyone()
        accelerator.log_with = make_trackers(args.trackers, output, self.progress.step)
        start_trackers(accelerator, vars(args), output, run_id, self.progress.step)
        self.stop = StopRequest(accelerator.num_processes)

    def restore(self) -> dict[str, Any]:
        """Weights, place and progress of the last checkpoint; returns the rest. Refuses another net, other data or settings."""
        path = self.output / "checkpoints" / "last"
        weights, header = load_weights(path / "model.safetensors")
        recipe = ModelConfig.from_header(header)
        if recipe is None or recipe.arch != self.args.arch:
            raise UserError(f"{path}: is a checkpoint of {recipe.arch if recipe else '?'}, not of --arch {self.args.arch}")
        if recipe.classes != self.loader.classes:
            raise UserError(
                f"{path}: was trained on {len(recipe.classes)} classes, {self.args.data} has {len(self.loader.classes)} "
                "(or others); resume with the same data"
            )
        saved, state = load_checkpoint(path)
        for name in SETTINGS:
            if state[name] != getattr(self.args, name):
                words = f"with{'' if state[name] else 'out'} --{name.replace('_', '-')}"
                value = f" {state[name]}" if state[name] and state[name] is not True else ""
                raise UserError(f"{path}: was made {words}{value}; resume with the same")
        self.loader.load_state_dict(state["loader"])
        self.learner.net.load_state_dict(weights)
        self.progress = Progress(**state["progress"])
        return saved

    def save(self, best: bool = False) -> None:
        """A checkpoint; none of a net that is lost."""
        self.check_finite()
        self.progress.seconds = time.perf_counter() - self.started
        if self.accelerator.is_main_process:
            state = {"loader": self.loader.state_dict(), "progress": asdict(self.progress)}
            state |= {name: getattr(self.args, name) for name in SETTINGS}
            learnt, folder = self.learner.state_dict(), self.output / "checkpoints"
            save_checkpoint(folder, self.progress.step, self.write_weights, learnt, state, best)

    def write_weights(self, path: Path) -> None:
        save_weights(path, self.learner.tested.state_dict(), self.recipe.header())

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
        """To the end, or until SIGTERM; either way nothing is lost."""
        quiet = not self.accelerator.is_main_process
        with tqdm(total=self.schedule.steps, initial=self.progress.step, unit=" steps", disable=quiet) as bar:
            try:
                while self.progress.step < self.schedule.steps or self.is_to_be_validated():
                    self.train_epoch(bar)
                    self.tell_of_replaced(bar)
                    self.save(self.validate(bar) if self.is_to_be_validated() else False)
                if self.accelerator.is_main_process:
                    self.write_weights(self.output / "model.safetensors")
            except Stopped:
                self.save()
                if not quiet:
                    bar.write(f"stopped at step {self.progress.step}, as asked, and saved; --resume goes on from there")
        self.accelerator.end_training()

    def is_to_be_validated(self) -> bool:
        """Whether a validation is due here that has not been done. The loader already has the next epoch's number."""
        is_due = self.loader.epoch % self.args.eval_every == 0 or self.progress.step == self.schedule.steps
        return self.val_loader is not None and is_due and self.progress.validated < self.progress.step

    def train_epoch(self, bar: Any) -> None:
        """The rest of the loader's epoch, or of the run, with a row every --log-every steps and a checkpoint every
        --checkpoint-every.
        """
        args, progress, steps_per_epoch = self.args, self.progress, len(self.loader)
        if progress.step == self.schedule.steps:
            return  # it was stopped between its last step and its last validation
        meter = Meter(self.accelerator.device)
        for batch in meter.timed(self.loader):
            rate = self.schedule.rate(progress.step, progress.errors)
            start = self.loader.consumed - args.batch_size
            loss, top1 = self.learner.step(batch, self.loader.epoch, start, rate)
            self.not_finite.add(progress.step, loss)
            meter.add(loss, top1)
            progress.step += 1
            bar.update()
            if progress.step % args.log_every == 0:
                self.check_finite()
                row = meter.read(args.batch_size, self.accelerator.gather)
                self.log({"lr": rate} | row)
                self.tell_of_waiting(bar, row["wait_share"])
                bar.set_postfix_str(
                    f"loss {row['train_loss']:.3f}, {row['images_per_s']:.0f} images/s, waiting for data {row['wait_share']:.1%}"
                )
            self.stop.check()
            # The ends of epoch and run have a checkpoint of their own, after validation.
            if progress.step % steps_per_epoch == 0:
                continue  # to the loader's own end of the epoch
            if progress.step == self.schedule.steps:
                return
            if progress.step % args.checkpoint_every == 0:
                self.save()

    def check_finite(self) -> None:
        """Raise UserError if the loss of a step so far was not finite; the step's images are then in RUN/not-finite.json."""
        step = self.not_finite.read(self.accelerator.gather)
        if step is None:
            return
        epoch, batch = divmod(step, len(self.loader))
        start = batch * self.args.batch_size
        ids = self.loader.order.samples(epoch, np.arange(start, start + self.args.batch_size)).tolist()
        path = self.output / "not-finite.json"
        if self.accelerator.is_main_process:
            found = {"step": step, "epoch": epoch, "ids": ids, "images": [self.loader.where(sample) for sample in ids]}
            path.write_text(json.dumps(found, indent=1))
        raise UserError(
            f"{path}: holds the images of step {step}, whose loss is not finite; look at them, or lower --lr, and --resume"
        )

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

    def validate(self, bar: Any) -> bool:
        """Score the validation split; returns whether this is the lowest error so far."""
        loader = self.val_loader
        assert loader is not None
        try:
            result = score(
                self.learner.tested,
                ((batch.images, batch.labels) for batch in self.stop.checked(loader, len(loader))),
                len(self.loader.classes),
                self.accelerator.device,
                self.accelerator.autocast,
                lambda counts: self.accelerator.reduce(counts, "sum"),
            )
        except Stopped:
            if self.loader.consumed == 0:  # back to the end of the epoch: a resumed run validates first
                self.loader.seek(self.loader.epoch - 1, self.loader.total)
            raise
        self.log({"val_top1": result.top1_rate, "val_top5": result.top5_rate})
        if self.accelerator.is_main_process:
            epoch = f"{self.progress.step / len(self.loader):.4g}"
            bar.write(f"epoch {epoch}: top-1 {result.top1_rate:.2%}, top-5 {result.top5_rate:.2%} of {result.images} images")
        self.progress.validated = self.progress.step
        errors = self.progress.errors
        errors.append(1 - result.top1_rate)
        return errors[-1] <= min(errors)


def main() -> None:
    args = parse_arguments(__doc__, sys.argv[1:])
    output = (args.output or Path("runs") / args.arch).absolute()
    resumes = check_output(args, output)
    terminate_with_launcher()
    rejoin_process_group()
    accelerator = Accelerator(
        mixed_precision=args.amp,
        gradient_accumulation_steps=args.accumulate,
        project_config=ProjectConfiguration(str(output), str(output)),
    )
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "fp16":  # whose sums would be float16, too
        raise UserError("precision fp16: a CPU does not train in it; take --amp bf16 or no")
    check_launch(accelerator.num_processes)
    if accelerator.device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    elif accelerator.device.type == "cpu":
        torch.set_num_threads(cores_per_process())  # accelerate launch and torchrun set OMP_NUM_THREADS=1 unless told otherwise
    run = Run(args, accelerator, output, resumes)
    if accelerator.is_main_process and output.parent.name == "runs":
        latest = output.parent / "latest"
        latest.unlink(missing_ok=True)
        latest.symlink_to(output.name)
    run.train()


if __name__ == "__main__":
    run_cli(main)
