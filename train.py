"""Train a ResNet from shards: accelerate launch train.py --arch resnet50 --data /data/shards

Runs on one GPU, on several GPUs or on the CPU, as configured in Accelerate (accelerate config). To train with two processes on
the CPU: ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 train.py ...

Batch size and learning rate are global: a run is the same for any number of processes. The run writes config.json, metrics.csv,
tensorboard/, checkpoints/{last,best} and, at the end, model.safetensors to the folder --output.

--resume continues a stopped run at the exact step, with the same samples and the same random draws. On SIGTERM, the run saves a
checkpoint and stops.
"""

from __future__ import annotations

import pipeline.starting  # noqa: F401  (first: the other imports take seconds)

# isort: split
import json
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from tqdm import tqdm

from model.checkpoints import find_last
from model.loading import first_difference, initial_weights
from model.resnet import pad_at_end
from model.testing import evaluate
from model.weights import ModelConfig, load_weights, save_weights
from pipeline.cli import run_cli
from pipeline.cores import bind_to_gpu, cores_per_process, local_processes
from pipeline.errors import StorageError, UserError
from pipeline.progress import progress_bar
from pipeline.store import files
from training.checkpoint import load_checkpoint, save_checkpoint
from training.command_line import parse_arguments
from training.launch import (
    check_exchange,
    check_launch,
    gradient_exchange,
    launcher_settings,
    rejoin_process_group,
    terminate_with_launcher,
)
from training.learner import Learner
from training.loaders import model_config_of, open_loaders, profile_command
from training.metrics import Meter, MetricsFile, NonFiniteLoss
from training.options import TrainOptions, make_schedule
from training.run_folder import check_output, lock, point_latest, write_config
from training.stopping import Stopped, StopRequest
from training.trackers import make_trackers, start_trackers

MAX_WAIT_SHARE = 0.05  # if training waits for data for more than this share of the time, the run suggests the profiler
STATE_OPTIONS = ("batch_size", "optimizer", "no_norm_decay", "ema")  # options that must not change when a run is resumed


@dataclass
class Progress:
    """The progress of a run, as saved in checkpoints. seconds: time spent on training. errors: top-1 error of each validation.
    validated: step of the last validation."""

    step: int = 0
    seconds: float = 0.0
    errors: list[float] = field(default_factory=list)
    validated: int = 0


class Run:
    """One training run, from its options to its last checkpoint."""

    def __init__(self, options: TrainOptions, accelerator: Accelerator, output: Path, resumes: bool) -> None:
        self.options, self.accelerator, self.output = options, accelerator, output
        self.loader, self.val_loader = open_loaders(options, accelerator)
        self.model_config = model_config_of(options, self.loader)
        self.progress = Progress()
        self.rows_logged, self.wait_reported = 0, False
        self.unsaved = ""  # the last checkpoint, if it could not be saved
        self.learner = Learner(options, accelerator, self.loader)
        saved = None
        if resumes:
            saved = self.restore()  # before anything is written, as it may raise UserError
        elif options.weights:
            message = initial_weights(options.weights, options.arch, self.learner.model, self.loader.classes)
            accelerator.print(message, flush=True)
        self.learner.prepare(self.loader, saved)
        self.schedule = make_schedule(options, len(self.loader))
        self.non_finite = NonFiniteLoss(accelerator.device)
        self.started = time.perf_counter() - self.progress.seconds
        self.start_records()
        self.stop = StopRequest(accelerator.num_processes)

    def start_records(self) -> None:
        """Open metrics.csv, write config.json and start the trackers."""
        options, accelerator, output, step = self.options, self.accelerator, self.output, self.progress.step
        run_id = ""  # only the main process needs it
        if accelerator.is_main_process:
            loader, spec = self.loader, self.loader.spec
            print(
                f"engine {loader.engine}: {loader.engine_reason}; {spec.threads} threads, prefetch {spec.prefetch}",
                flush=True,
            )
            self.locked = lock(output)  # held until this process ends
            self.metrics = MetricsFile(output / "metrics.csv", step)
            run_id = write_config(output, options, accelerator, loader, step)
        accelerator.wait_for_everyone()
        accelerator.log_with = make_trackers(options.trackers, output, step)
        start_trackers(accelerator, asdict(options), output, run_id, step)

    def restore(self) -> dict[str, Any]:
        """Load weights, loader state and progress from the last checkpoint. Returns the remaining state, for `Learner.prepare`.
        Raises UserError if the checkpoint belongs to another model or data set, or was saved with other options.
        """
        folder = self.output / "checkpoints"
        path = find_last(folder, lambda line: self.accelerator.print(line, flush=True)) or folder / "last"
        weights, header = load_weights(path / "model.safetensors")
        config = ModelConfig.from_header(header)
        if config is None or config.arch != self.options.arch:
            raise UserError(f"{path}: is a checkpoint of {config.arch if config else '?'}, but `arch` is {self.options.arch}")
        if config.classes != self.loader.classes:
            raise UserError(
                f"{path}: its {len(config.classes)} classes differ from the {len(self.loader.classes)} of {self.options.data}: "
                f"{first_difference(config.classes, self.loader.classes)}",
                "resume with the same data",
            )
        saved, state = load_checkpoint(path)
        for name in STATE_OPTIONS:
            if state[name] != getattr(self.options, name):
                value = f" {state[name]}" if state[name] and state[name] is not True else ""
                option = f"with{'' if state[name] else 'out'} `{name}`{value}"
                raise UserError(f"{path}: was saved {option}", f"resume {option}")
        self.loader.load_state_dict(state["loader"])
        self.learner.model.load_state_dict(weights)
        if config.pads_at_end:  # permuted weights would give sums in another order, and other losses in their last digits
            pad_at_end(self.learner.model)
            self.model_config = replace(self.model_config, pads_at_end=True)
        self.progress = Progress(**state["progress"])
        return saved

    def save(self, best: bool = False) -> None:
        """Save a checkpoint. Raises UserError instead if the loss is not finite."""
        self.check_finite()
        self.progress.seconds = time.perf_counter() - self.started
        if self.accelerator.is_main_process:
            state = {"loader": self.loader.state_dict(), "progress": asdict(self.progress)}
            state |= {name: getattr(self.options, name) for name in STATE_OPTIONS}
            folder = self.output / "checkpoints"
            try:
                save_checkpoint(folder, self.progress.step, self.write_weights, self.learner.state_dict(), state, best)
            except StorageError as error:
                self.unsaved = f"the checkpoint of step {self.progress.step}"
                tqdm.write(f"{self.unsaved} is not saved: {error}")
            else:
                self.unsaved = ""

    def write_weights(self, path: Path) -> None:
        save_weights(path, self.learner.eval_model.state_dict(), self.model_config.header())

    def log(self, values: dict[str, float]) -> None:
        """Write a row of metrics.csv and send the values to the trackers."""
        row = {
            "step": self.progress.step,
            "epoch": self.progress.step / len(self.loader),
            "seconds": time.perf_counter() - self.started,
        }
        if self.accelerator.is_main_process:
            try:
                self.metrics.write(row | values)
            except StorageError as error:
                tqdm.write(f"step {self.progress.step} is not logged: {error}")
        try:
            self.accelerator.log(values, step=self.progress.step)
        except OSError as error:  # TensorBoard's files
            tqdm.write(f"step {self.progress.step} is not in the trackers: {error.strerror or error}")

    def train(self) -> None:
        """Train to the last step or until SIGTERM, and save a checkpoint."""
        quiet = not self.accelerator.is_main_process
        with progress_bar(
            total=self.schedule.steps, initial=self.progress.step, unit=" steps", disable=quiet, delayed=False
        ) as bar:
            try:
                while self.progress.step < self.schedule.steps or self.validation_due():
                    self.train_epoch(bar)
                    self.report_replaced()
                    self.save(self.validate() if self.validation_due() else False)
                if self.accelerator.is_main_process:
                    self.write_final()
            except Stopped:
                self.save()
                if self.unsaved:
                    raise UserError(
                        "stopped on SIGTERM; " + self.lost(), "free some space, then continue with `resume`"
                    ) from None
                if not quiet:
                    tqdm.write(f"stopped at step {self.progress.step} on SIGTERM and saved a checkpoint; continue with --resume")
        try:
            self.accelerator.end_training()
        except OSError as error:  # TensorBoard's files
            tqdm.write(f"the trackers lack the last rows: {error.strerror or error}")

    def write_final(self) -> None:
        """Write model.safetensors. Raises UserError, which says what a resumed run repeats."""
        try:
            self.write_weights(self.output / "model.safetensors")
        except StorageError as error:
            raise UserError(f"{error.problem}; {self.lost()}", f"{error.remedy}, then continue with `resume`") from error

    def lost(self) -> str:
        """What a resumed run repeats."""
        last = find_last(self.output / "checkpoints")
        where = f"the last checkpoint is {last.resolve().name.rstrip('+')}" if last else "there is no checkpoint"
        return f"{self.unsaved} is not saved, and {where}" if self.unsaved else where

    def validation_due(self) -> bool:
        """Whether to validate at this end of an epoch or of the run. `loader.epoch` is already the number of the next epoch."""
        is_time = self.loader.epoch % self.options.eval_every == 0 or self.progress.step == self.schedule.steps
        return self.val_loader is not None and is_time and self.progress.validated < self.progress.step

    def train_epoch(self, bar: Any) -> None:
        """Train to the end of the loader's epoch or of the run. Logs metrics every `log_every` steps and saves a checkpoint every
        `checkpoint_every` steps.
        """
        options, progress = self.options, self.progress
        if progress.step == self.schedule.steps:
            return  # the run had been stopped between its last step and its last validation
        meter = Meter(self.accelerator.device)
        for batch in meter.timed(self.loader):
            rate = self.schedule.rate(progress.step, progress.errors)
            start = self.loader.consumed - options.batch_size
            loss, top1 = self.learner.step(batch, self.loader.epoch, start, rate)
            self.non_finite.add(progress.step, loss)
            meter.add(loss, top1)
            progress.step += 1
            bar.update()
            if progress.step % options.log_every == 0:
                self.log_interval(meter, rate, bar)
            self.stop.check()
            # At the end of an epoch and of the run, `train` saves a checkpoint after validation.
            if progress.step % len(self.loader) == 0:
                continue  # lets the loader finish its epoch
            if progress.step == self.schedule.steps:
                return
            if progress.step % options.checkpoint_every == 0:
                self.save()

    def log_interval(self, meter: Meter, rate: float, bar: Any) -> None:
        """Log the metrics of the last `log_every` steps and show them in the progress bar."""
        self.check_finite()
        row = meter.read(self.options.batch_size, self.accelerator.gather)
        self.log({"lr": rate} | row)
        self.report_data_wait(row["wait_share"])
        bar.set_postfix_str(
            f"loss {row['train_loss']:.3f}, {row['images_per_s']:.0f} images/s, waiting for data {row['wait_share']:.1%}"
        )

    def check_finite(self) -> None:
        """Raise UserError if the loss of a step was not finite, after listing the images of that step in RUN/not-finite.json."""
        step = self.non_finite.read(self.accelerator.gather)
        if step is None:
            return
        epoch, batch = divmod(step, len(self.loader))
        start = batch * self.options.batch_size
        ids = self.loader.order.samples(epoch, np.arange(start, start + self.options.batch_size)).tolist()
        path = self.output / "not-finite.json"
        if self.accelerator.is_main_process:
            found = {"step": step, "epoch": epoch, "ids": ids, "images": [self.loader.locate(sample) for sample in ids]}
            files.write(str(path), json.dumps(found, indent=1).encode())
        raise UserError(
            f"the loss of step {step} is not finite; the images of that step are listed in {path}",
            "inspect them or lower `lr`, then continue with `resume`",
        )

    def report_data_wait(self, share: float) -> None:
        """Suggest the profiler, once, if training waits for data. The first row is ignored: it includes the loader's start-up."""
        self.rows_logged += 1
        if share > MAX_WAIT_SHARE and self.rows_logged > 1 and not self.wait_reported:
            self.wait_reported = True
            if self.accelerator.is_main_process:
                command = profile_command(self.options, self.accelerator.mixed_precision)
                tqdm.write(f"training waits for data {share:.0%} of the time; to find out what to change, run: {command}")

    def report_replaced(self) -> None:
        """Print how many corrupt images have been replaced since the start, over all ranks, if any."""
        count = torch.tensor(self.loader.replaced, device=self.accelerator.device)
        replaced = int(self.accelerator.reduce(count, "sum"))
        if replaced and self.accelerator.is_main_process:
            tqdm.write(f"epoch {self.loader.epoch}: {replaced} images that could not be decoded have been replaced so far")

    def validate(self) -> bool:
        """Evaluate on the validation split; returns whether this is the lowest error so far."""
        loader = self.val_loader
        assert loader is not None
        checked = self.stop.checked(loader, len(loader))
        batches = progress_bar(checked, total=len(loader), desc="validation", unit=" batches", leave=False)
        try:
            result = evaluate(
                self.learner.eval_model,
                ((batch.images, batch.labels) for batch in batches),
                len(self.loader.classes),
                self.accelerator.device,
                self.accelerator.autocast,
                lambda counts: self.accelerator.reduce(counts, "sum"),
            )
        except Stopped:
            if self.loader.consumed == 0:  # seek back to the end of the epoch, so that a resumed run validates first
                self.loader.seek(self.loader.epoch - 1, self.loader.total)
            raise
        finally:
            loader.close()  # training gets its threads and its memory
        self.log({"val_top1": result.top1_rate, "val_top5": result.top5_rate})
        if self.accelerator.is_main_process:
            epoch = f"{self.progress.step / len(self.loader):.4g}"
            tqdm.write(f"epoch {epoch}: top-1 {result.top1_rate:.2%}, top-5 {result.top5_rate:.2%} of {result.images} images")
        self.progress.validated = self.progress.step
        errors = self.progress.errors
        errors.append(1 - result.top1_rate)
        return errors[-1] <= min(errors)


def main() -> None:
    options = parse_arguments(__doc__, sys.argv[1:])
    output = (options.output or Path("runs") / options.arch.replace("/", "-")).absolute()
    if output.is_symlink():  # runs/latest
        output = output.resolve()
    resumes = check_output(options.resume, output)
    terminate_with_launcher()
    with launcher_settings():
        rejoin_process_group()
        accelerator = Accelerator(
            mixed_precision=options.amp,
            gradient_accumulation_steps=options.accumulate,
            project_config=ProjectConfiguration(str(output), str(output)),
            kwargs_handlers=[gradient_exchange(options.accumulate, options.compress_gradients)],
        )
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "fp16":  # a CPU would also accumulate in fp16
        raise UserError("training in fp16 is not supported on a CPU", "use --amp bf16 or --amp no")
    check_launch(accelerator.num_processes)
    check_exchange(options.compress_gradients, accelerator)
    if accelerator.device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        devices = range(min(local_processes(), torch.cuda.device_count()))
        found = [torch.cuda.get_device_properties(device) for device in devices]
        gpus = [f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0" for gpu in found]  # type: ignore[attr-defined]
        bind_to_gpu(gpus, accelerator.local_process_index % len(gpus))  # before the loaders start threads
    elif accelerator.device.type == "cpu":
        torch.set_num_threads(cores_per_process())  # accelerate launch and torchrun set OMP_NUM_THREADS=1
    run = Run(options, accelerator, output, resumes)
    if accelerator.is_main_process and output.parent.name == "runs":
        point_latest(output)
    run.train()


if __name__ == "__main__":
    run_cli(main, is_log=True)
