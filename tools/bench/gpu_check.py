"""Every check and benchmark that needs a GPU: python tools/bench/gpu_check.py

Runs the parts below in this order, the most important ones first, within --budget seconds: a part that exceeds its share stops
after the row that it measures, and parts for which no time is left are skipped, with a line. Each row is printed when it has been
measured, and appended to results/gpu.csv. The exit code is 1 if a check failed. The images are synthetic unless --source names
real ones. The script requires what train.py requires; without DALI, the rows of DALI are left out. In a copy of the checkout
without git, CROPFEED_COMMIT names the commit. `--device cpu` with small sizes tests the script itself without a GPU; its figures
mean nothing.

- probe: the doctor's report (driver, nvJPEG, engines), cores, and the speed of copies from pinned memory.
- train: images/s of a bf16 training step of each --arch from shards by each engine, and of the same step on one synthetic batch,
  in turns (goal: a ratio of 0.98, with a data wait under 1 %); peak memory.
- threads: images/s of the CPU engine by its number of threads, into GPU memory.
- pixels: each engine on the device against the Pillow reference (mean difference <= 1, 99.9th percentile <= 4, of 255), also on
  unusual JPEGs of every profile, with all and with none of them on the hardware decoder, and in batches held for 200 steps.
- models: logits against those of torchvision's ResNets, if torchvision is installed.
- loader: images/s of every engine, into GPU memory, for original, lossless and compact shards, for several shares of the hardware
  JPEG decoder, and for cut and whole streams; in turns with the stock DALI pipeline. Goals: twice stock DALI, and three times the
  demand of training. As in `train` and `threads`, with CPU seconds for each image and the utilization of the JPEG engine.
- steps: the train step of the first --arch, compiled and eager, against those of torchvision and timm, if these are installed
  (goal: 1.1 times their throughput).
- tail: lighting and normalization on the device, eager, fused and compiled.
- graphs: the train step with a moving average of the weights, eager and with CUDA graphs.
- profile: the profiler's verdict on training with these shards, with times from the GPU's clock and utilization from NVML.
- wrapped: the train step in DistributedDataParallel, in one process, with the model compiled inside of it and outside.
"""

from __future__ import annotations

import faulthandler
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import _path  # noqa: F401
import torch

from model import ARCHS
from pipeline.cli import Parser, positive, run_cli
from pipeline.convert.make import ConvertOptions, make_shards
from pipeline.cores import usable_cores
from pipeline.errors import UserError
from pipeline.plan import sampling
from pipeline.plan.geometry import ScaleJitter
from pipeline.spec import LoaderSpec
from tools.bench.gpu_loader import measure_loaders, measure_threads
from tools.bench.gpu_pixels import check_models, check_pixels
from tools.bench.gpu_probe import measure_tail, probe
from tools.bench.gpu_setting import Setting, engines
from tools.bench.gpu_train import measure_graphs, measure_steps, measure_train, measure_wrapped
from tools.bench.recording import RESULTS
from tools.make_demo_data import make_demo_data
from tools.profiler.measuring import Budget
from tools.profiler.options import ProfileOptions
from tools.profiler.profile import profile
from tools.profiler.table import table
from training.tuned import with_tuned

REPEATS = 5
BUDGET = 480.0  # seconds
GRACE = 20.0  # seconds beyond the budget, after which a call that hangs ends the script
PROFILES = ("lossless", "original", "compact")
ROWS = RESULTS / "gpu.csv"


class OutOfTimeError(BaseException):
    """The budget is used up. Not an Exception, which compilers catch to fall back."""


@dataclass(frozen=True)
class GpuCheckOptions:
    """What to check. source: folder of class folders of JPEGs. images: number of synthetic images for each of 8 classes, if
    `source` is None. seconds: duration of each repeat of training. budget: seconds for everything. Raises UserError for a missing
    GPU, and for `device` cpu with the file of GPU rows."""

    device: str = "cuda"
    arch: tuple[str, ...] = ("resnet50",)
    parts: tuple[str, ...] = ()
    batch_size: int = 256
    image_size: int = 224
    source: Path | None = None
    images: int = 250
    seconds: float = 2.0
    budget: float = BUDGET
    results: Path = ROWS

    def __post_init__(self) -> None:
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise UserError("torch sees no CUDA GPU", "run this on a machine that has one")
        if self.device == "cpu" and self.results == ROWS:
            raise UserError("`device` cpu measures no GPU", "give another `results` file")
        if not 0 < self.budget < float("inf"):
            raise UserError(f"`budget` must be above 0, not {self.budget}")

    @property
    def images_in_words(self) -> str:
        return self.source.name if self.source else "drawn images"


def check_profiler(setting: Setting) -> Iterator[bool]:
    """Print the profiler's verdict on training a model on the device; it must contain a demand and a verdict."""
    options = ProfileOptions(
        setting.spec, arch=setting.archs[0], precision="bf16", cache_state="warm", engines=engines(), repeats=setting.repeats,
        seconds=setting.seconds / 4, budget=40,
    )  # fmt: skip
    found = profile(options)
    print(table(found), flush=True)
    yield bool(found["demand"] and found["verdict"]["limit"] in ("input", "compute", "balanced"))


# The parts, most important first, with their shares of the budget. They yield after each row whether its check passed.
Part = Callable[[Setting], Iterator[bool]]
PARTS: dict[str, tuple[Part, int]] = {
    "probe": (probe, 4),
    "train": (measure_train, 16),
    "threads": (measure_threads, 8),
    "pixels": (check_pixels, 14),
    "models": (check_models, 4),
    "loader": (measure_loaders, 22),
    "steps": (measure_steps, 14),
    "tail": (measure_tail, 2),
    "graphs": (measure_graphs, 8),
    "profile": (check_profiler, 8),
    "wrapped": (measure_wrapped, 6),
}


def run_parts(setting: Setting, parts: Sequence[str], budget: Budget) -> bool:
    """Run these of PARTS in their order. Returns whether all checks passed.

    A part gets at least its share of the budget, and what the parts before it have left, but never more than all of it.
    """
    good, used, out_of_time = True, 0.0, False
    total = sum(PARTS[name][1] for name in parts)
    for name in sorted(parts, key=list(PARTS).index):
        part, percent = PARTS[name]
        now, share = time.perf_counter(), percent / total
        if out_of_time or now >= budget.until():
            print(f"{name}: skipped, the budget of {budget.seconds:.0f} s is used up", flush=True)
            continue
        used += share
        until = min(budget.until(), max(budget.until(used), now + share * budget.seconds))
        try:
            good &= run_part(name, part(setting), until)
        except OutOfTimeError:
            out_of_time = True
            print(f"{name}: stopped in the middle, the budget is used up", flush=True)
        print(f"{name}: {time.perf_counter() - now:.0f} s", flush=True)
    return good


def run_part(name: str, rows: Iterator[bool], until: float) -> bool:
    """Take the rows of a part until this time, by `perf_counter`. Returns whether all checks passed. An error ends this part."""
    good = True
    try:
        for row in rows:
            good &= row
            if time.perf_counter() >= until:
                print(f"{name}: stopped, its time is used up; what it would measure next is left out", flush=True)
                break
    except Exception:  # so that the other parts still run
        traceback.print_exc()
        print(f"{name}: FAILED with an error", flush=True)
        return False
    if not good:
        print(f"{name}: FAILED", flush=True)
    return good


def limit_time(seconds: float) -> None:
    """Raise OutOfTimeError in this process after so many seconds, and end it GRACE later where a call does not return."""

    def stop(*_: object) -> None:
        raise OutOfTimeError

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(seconds + GRACE, exit=True)


def end_limit() -> None:
    signal.setitimer(signal.ITIMER_REAL, 0)
    faulthandler.cancel_dump_traceback_later()


def make_data(folder: Path, source: Path | None, per_class: int, profiles: Sequence[str]) -> dict[str, Path]:
    """Shards by profile, made from the images in `source`, or from synthetic ones: 4:4:4, 4:2:0, 4:2:2 and grey."""
    if source is None:
        source = folder / "images"
        make_demo_data(source, per_class, 8, 0, usable_cores())
    shards = {}
    for name in profiles:
        shards[name] = folder / name
        make_shards(ConvertOptions(str(source), str(shards[name]), name, shard_size=250))
    return shards


def parse() -> GpuCheckOptions:
    parser = Parser(__doc__)
    parser.add_argument("--device", help="torch device (default: cuda)")
    parser.add_argument("--arch", nargs="+", choices=ARCHS, metavar="ARCH", help="models (default: resnet50)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="default: all, in this order")
    parser.add_argument("--batch-size", type=positive, help="default: 256")
    parser.add_argument("--image-size", type=positive, help="side of the crop, pixels (default: 224)")
    parser.add_argument("--source", type=Path, help="folder of class folders of JPEGs, instead of synthetic images")
    parser.add_argument("--images", type=positive, help="number of synthetic images for each of 8 classes (default: 250)")
    parser.add_argument("--seconds", type=float, help="duration of each repeat of training (default: 2)")
    parser.add_argument("--budget", type=float, help="seconds that all parts may take (default: 480)")
    parser.add_argument("--results", type=Path, help="file to append rows to (default: tools/bench/results/gpu.csv)")
    parser.set_defaults(**{field.name: field.default for field in fields(GpuCheckOptions)})
    args = vars(parser.parse_args())
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in args.items()}
    return GpuCheckOptions(**values)


def check(options: GpuCheckOptions, folder: Path, began: float) -> bool:
    """Make the data and run the parts; returns whether all checks passed. began: when the script did, by `perf_counter`."""
    parts = options.parts or tuple(PARTS)
    profiles = PROFILES if {"pixels", "loader"} & set(parts) else PROFILES[:1]
    data = make_data(folder, options.source, options.images, profiles)
    spec = LoaderSpec(
        data["lossless"],
        batch_size=options.batch_size,
        image_size=options.image_size,
        geometry=ScaleJitter().scaled(options.image_size, sampling.CROP),
        dtype=torch.bfloat16,
        device=options.device,
    )
    spec = with_tuned(spec, None, None)  # the threads of train.py, which leaves two cores to the host
    setting = Setting(data, spec, folder, options.results, options.seconds, REPEATS, options.images_in_words, options.arch)
    print(f"data made after {time.perf_counter() - began:.0f} s", flush=True)
    left = options.budget - (time.perf_counter() - began)
    return run_parts(setting, parts, Budget(left))


def main() -> None:
    began = time.perf_counter()
    options = parse()
    torch.backends.cudnn.benchmark = True  # as in train.py and in the reference scripts
    limit_time(options.budget)
    with tempfile.TemporaryDirectory() as folder:
        try:
            good = check(options, Path(folder), began)
        except OutOfTimeError:
            raise UserError(f"the `budget` of {options.budget:g} s was used up before the first part", "raise it") from None
        end_limit()
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    run_cli(main)
