"""Time to accuracy: train.py against a typical training script, with the same model, recipe and cores.

    python tools/bench/bench_accuracy.py --shards SHARDS --images IMAGES --work RUNS --cores 1 --seeds 0 1 2 -- --epochs 16

SHARDS must be made from the images in IMAGES. Trains each contender with every seed, one run after another; the contenders
take turns:

- cropfeed: train.py --recipe RECIPE, with the options after `--`;
- plain: peers/plain_train.py (PyTorch's DataLoader, Pillow) with the same hyper-parameters, but in float32, with the contiguous
  layout, and at the final image size throughout;
- plain bf16: the same with everything that the recipe does for the model (precision, channels-last, progressive resizing,
  torch.compile), so that only the input differs.

Every run is pinned to --cores and uses as many threads. To continue after an interruption, start the script again: it keeps
finished runs and repeats the interrupted one, because the time of a partial run cannot be compared.

At the end, the script appends a row for each contender and comparison to results/accuracy_runs.csv, and their figures to
results/accuracy.csv: epochs and minutes to each level of validation top-1 (inf: not reached), minutes of the whole run, minutes
of its process including start-up, and ratios of the times with the same seed.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _path  # noqa: F401

from pipeline.cli import Parser, positive, run_cli
from pipeline.errors import UserError
from tools import ROOT
from tools.bench.accuracy import Run, figures, ratios, read_run
from tools.bench.peers.plain_train import PlainOptions
from tools.bench.recording import RESULTS, record
from training.command_line import parse_arguments
from training.options import TrainOptions, make_schedule

CROPFEED, PLAIN, PLAIN_BF16 = "cropfeed", "plain", "plain bf16"
CONTENDERS = (CROPFEED, PLAIN, PLAIN_BF16)
# How the plain script treats train.py's options. It lacks the options that are not listed, so these must keep their defaults.
SAME = (
    "arch", "epochs", "batch_size", "momentum", "schedule", "warmup", "weight_decay", "no_norm_decay", "label_smoothing", "ema",
    "image_size", "eval_size", "flip_test", "geometry", "scale", "area", "seed", "eval_every", "log_every",
)  # fmt: skip
OF_MODEL = ("start_size", "ramp", "compile")  # for "plain bf16" only, as precision and layout are
CHOICES: dict[str, tuple[Any, ...]] = {  # the only values that it supports
    "schedule": ("cosine", "linear"), "geometry": ("jitter", "rrc"), "alpha_std": (0.0,), "mean": ("channel",),
}  # fmt: skip
FREE = (
    "recipe", "data", "output", "resume", "lr", "scale_lr", "amp", "blurpool", "milestones", "patience", "order", "block_shards",
    "corrupt", "verify", "engine", "threads", "prefetch", "cache", "cache_gb", "checkpoint_every", "trackers",
)  # fmt: skip
GIVEN = ("--recipe", "--data", "--output", "--resume", "--seed")  # train.py's options that this script sets


@dataclass(frozen=True)
class AccuracyOptions:
    """What to compare. shards, images: the same data set in both forms; images is a folder with train/ and val/. work: folder
    for the runs. cores: numbers of the cores to which runs are pinned. workers: number of workers of the plain script's
    DataLoader. training: further words of train.py's command line. levels: top-1 accuracies, percent. rows_only: train nothing.
    """

    shards: str
    images: Path
    work: Path
    recipe: str
    contenders: tuple[str, ...]
    seeds: tuple[int, ...]
    levels: tuple[float, ...]
    cores: tuple[int, ...]
    workers: int
    rows_only: bool
    results: Path
    training: tuple[str, ...]

    def __post_init__(self) -> None:
        for option in (word.split("=")[0] for word in self.training):
            if option in GIVEN:
                raise UserError(f"{option} is not allowed after `--`: this script sets it for train.py")

    def training_words(self, seed: int) -> list[str]:
        """train.py's arguments, without --output."""
        return ["--recipe", self.recipe, "--data", self.shards, "--seed", str(seed), *self.training]

    def train_options(self, seed: int) -> TrainOptions:
        return parse_arguments(None, self.training_words(seed))


# Runs


def plain_options(options: TrainOptions, images: Path, like_recipe: bool, workers: int, threads: int) -> PlainOptions:
    """The plain script's options with the hyper-parameters of train.py's. like_recipe: also with everything that the recipe does
    for the model. Raises UserError for an option that the plain script lacks."""
    defaults = TrainOptions(data=options.data)
    for name, value in vars(options).items():
        flag = f"--{name.replace('_', '-')}"
        if value not in CHOICES.get(name, (value,)):
            raise UserError(f"the plain script has no {flag} {value}", f"give {flag} {CHOICES[name][0]} after `--`")
        if value != getattr(defaults, name) and name not in (*SAME, *OF_MODEL, *CHOICES, *FREE):
            raise UserError(f"the plain script has no {flag}", f"leave it out, or give --contenders {CROPFEED}")
    values = {name: getattr(options, name) for name in (*SAME, *(OF_MODEL if like_recipe else ()))}
    given = {name: value for name, value in values.items() if value is not None}
    if like_recipe:
        given |= {"precision": options.amp or "no", "channels_last": True}
    return PlainOptions(images, lr=make_schedule(options, 1).base, workers=workers, threads=threads, **given)


def command(contender: str, seed: int, options: AccuracyOptions) -> list[str]:
    """The arguments of `python` for a run, without --output."""
    if contender == CROPFEED:
        return [str(ROOT / "train.py"), *options.training_words(seed)]
    like_recipe, images = contender == PLAIN_BF16, options.images.absolute()
    plain = plain_options(options.train_options(seed), images, like_recipe, options.workers, len(options.cores))
    return ["-m", "tools.bench.peers.plain_train", plain.json()]


@contextmanager
def pinned(cores: Sequence[int]) -> Iterator[None]:
    """Pin this process to these cores, and with it all processes that it starts in the meantime."""
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, cores)
    except OSError as error:
        raise UserError(f"--cores {' '.join(map(str, cores))}: {error.strerror}", f"choose from {sorted(before)}") from error
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def run_once(folder: Path, words: list[str], cores: Sequence[int]) -> None:
    """Train in `folder`, unless the run has already finished there. words: see `command`."""
    finished = folder / "finished.json"
    made = {"command": words, "cores": list(cores)}
    if finished.exists():
        before = json.loads(finished.read_text())
        if {key: before[key] for key in made} != made:
            raise UserError(f"{folder}: holds a run of another command ({shlex.join(before['command'])})", "give another --work")
        return
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    log, output = folder / "log.txt", folder / "run"
    environment = os.environ | {"OMP_NUM_THREADS": str(len(cores)), "PYTHONPATH": str(ROOT)}
    began = time.perf_counter()
    with log.open("wb") as stream, pinned(cores):
        process = subprocess.Popen(
            [sys.executable, *words, "--output", str(output)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
        )
    try:
        process.wait()
    finally:
        process.kill()
        process.wait()
    seconds = time.perf_counter() - began
    if process.returncode:
        last = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
        raise UserError(f"{log}: the run ended with exit code {process.returncode}: {last}")
    finished.write_text(json.dumps(made | {"wall_seconds": seconds}, indent=1))


def run_folder(work: Path, contender: str, seed: int) -> Path:
    return work / f"{contender.replace(' ', '-')}-seed{seed}"


# Rows


def finished_runs(work: Path, contenders: Sequence[str], seeds: Sequence[int]) -> dict[str, list[Run]]:
    """Runs by contender; contenders without any run are left out. Raises UserError if only some seeds of a contender are
    missing."""
    found = {}
    for contender in contenders:
        folders = [run_folder(work, contender, seed) for seed in seeds]
        missing = [folder for folder in folders if not (folder / "finished.json").exists()]
        if not missing:
            found[contender] = [read_run(folder) for folder in folders]
        elif len(missing) < len(folders):
            raise UserError(f"{missing[0]}: no finished run", "start this again without --rows-only, or name other --seeds")
    if not found:
        raise UserError(f"{work}: no finished run there", "start this without --rows-only")
    return found


def report(runs: dict[str, list[Run]], levels: Sequence[float], spec: str, results: Path) -> None:
    """Record the figures. runs: by contender, in the order of the seeds."""
    table = results.with_name(f"{results.stem}_runs{results.suffix}")
    found = {contender: list(figures(own, levels)) for contender, own in runs.items()}
    for contender, own in runs.items():
        if contender != CROPFEED and CROPFEED in runs:
            found[f"{CROPFEED} / {contender}"] = list(ratios(runs[CROPFEED], own, levels))
    for engine, rows in found.items():
        record(results, "time to accuracy", *rows, engine=engine, spec=spec, cache="warm", runs=table)


def parse(words: Sequence[str]) -> AccuracyOptions:
    at = words.index("--") if "--" in words else len(words)
    parser = Parser(__doc__)
    parser.add_argument("--shards", required=True, help="folder of shards, for train.py")
    parser.add_argument("--images", required=True, type=Path, help="the same images as a folder with train/ and val/")
    parser.add_argument("--work", required=True, type=Path, help="folder for the runs")
    parser.add_argument("--recipe", default="imagenette", help="train.py's recipe (default: imagenette)")
    parser.add_argument("--contenders", nargs="+", default=CONTENDERS, choices=CONTENDERS, help="what to train (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2), help="seeds to train with (default: 0 1 2)")
    parser.add_argument("--levels", nargs="+", type=float, default=(80.0, 85.0, 90.0),
                        help="top-1 accuracies to which times are measured, percent (default: 80 85 90)")  # fmt: skip
    cores = sorted(os.sched_getaffinity(0))
    parser.add_argument("--cores", nargs="+", type=int, default=cores, help="numbers of the cores to run on (default: all)")
    parser.add_argument("--workers", type=positive, help="workers of the plain script's DataLoader (default: one per core)")
    parser.add_argument("--rows-only", action="store_true", help="train nothing; record the runs in --work that have finished")
    parser.add_argument("--results", type=Path, default=RESULTS / "accuracy.csv",
                        help="file to append figures to; descriptions of the runs go to NAME_runs.csv beside it")  # fmt: skip
    args = vars(parser.parse_args(words[:at]))
    args["workers"] = args["workers"] or len(args["cores"])
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in args.items()}
    return AccuracyOptions(**values, training=tuple(words[at + 1 :]))


def main() -> None:
    options = parse(sys.argv[1:])
    recipe = options.train_options(options.seeds[0])
    if not recipe.epochs:
        raise UserError("the comparison counts epochs", "give the length of the runs with --epochs, not --iterations")
    jobs = [(seed, name) for i, seed in enumerate(options.seeds) for name in rotated(options.contenders, i)]
    commands = [command(name, seed, options) for seed, name in jobs]
    if not options.rows_only:
        for number, ((seed, name), words) in enumerate(zip(jobs, commands, strict=True), 1):
            folder = run_folder(options.work, name, seed).absolute()
            print(f"run {number} of {len(jobs)}: {name}, seed {seed}; its progress: {folder / 'log.txt'}", flush=True)
            run_once(folder, words, options.cores)
    runs = finished_runs(options.work, options.contenders, options.seeds)
    model = f"{recipe.arch} at {recipe.image_size}, {recipe.epochs} epochs, batch {recipe.batch_size}"
    seeds = " ".join(map(str, options.seeds))
    spec = f"{options.images.name}, recipe {shlex.join([options.recipe, *options.training])}: {model}; seeds {seeds}"
    with pinned(options.cores):  # so that the rows' hardware has this number of cores
        report(runs, options.levels, f"{spec}; {len(options.cores)} cores each", options.results)


def rotated(contenders: Sequence[str], number: int) -> list[str]:
    """The contenders in the order of turn `number`. Each turn begins with another one."""
    at = number % len(contenders)
    return [*contenders[at:], *contenders[:at]]


if __name__ == "__main__":
    run_cli(main)
