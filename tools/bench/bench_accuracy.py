"""Time to accuracy: train.py against the training script that people write, same net, same recipe, same cores.

    python tools/bench/bench_accuracy.py --shards SHARDS --images IMAGES --work RUNS --cores 1 --seeds 0 1 2 -- --epochs 16

SHARDS are made of the folder IMAGES. Trains with every seed, one run after another, the contenders in turns:

- cropfeed: train.py --recipe RECIPE, with the options behind `--`;
- plain: peers/plain_train.py (PyTorch's DataLoader, Pillow) with the same hyper-parameters, otherwise float32,
  contiguous layout, the final picture size throughout;
- plain bf16: the same with all that the recipe gives the net (precision, channels-last, progressive sizes, torch.compile), so
  that only the data feed differs.

Every run is pinned to --cores, with as many threads. Start it again after a stop: finished runs are kept, a stopped one is done
anew, as the time of half a run means nothing. Then appends to results/accuracy.csv: epochs and minutes to each level of
validation top-1 (inf: not reached), of the whole run and of the process with its start; ratios of the same seed's times.
`--rows-only` makes the rows of the finished runs in --work alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import _path  # noqa: F401
from tqdm import tqdm

from pipeline.cli import Parser, positive, run_cli
from pipeline.errors import UserError
from tools import ROOT
from tools.bench.recording import Figure, record
from training.metrics import read_metrics
from training.options import make_schedule, parse_arguments
from training.options import parser as train_parser

OURS, PLAIN, PLAIN_BF16 = "cropfeed", "plain", "plain bf16"
CONTENDERS = (OURS, PLAIN, PLAIN_BF16)
# train.py's options by what the plain script does with them. Others must have their defaults: it could not follow.
SAME = (
    "arch", "epochs", "batch_size", "momentum", "schedule", "warmup", "weight_decay", "no_norm_decay", "label_smoothing", "ema",
    "image_size", "eval_size", "flip_test", "geometry", "scale", "area", "seed", "eval_every", "log_every",
)  # fmt: skip
OF_NET = ("start_size", "ramp", "compile")  # for "plain bf16" alone, as precision and layout are
CHOICES: dict[str, tuple[Any, ...]] = {  # all that it has
    "schedule": ("cosine", "linear"), "geometry": ("jitter", "rrc"), "alpha_std": (0.0,), "mean": ("channel",),
}  # fmt: skip
FREE = (
    "recipe", "data", "output", "resume", "lr", "scale_lr", "amp", "blurpool", "milestones", "patience", "order", "block_shards",
    "corrupt", "engine", "threads", "prefetch", "cache", "cache_gb", "checkpoint_every", "trackers",
)  # fmt: skip
GIVEN = ("--recipe", "--data", "--output", "--resume", "--seed")  # train.py's options that this program gives


class Curve(NamedTuple):
    """A run's validations in order: epochs done, minutes since training began (validations included), top-1 in percent."""

    epochs: tuple[float, ...]
    minutes: tuple[float, ...]
    top1: tuple[float, ...]

    def reach(self, level: float) -> tuple[float, float]:
        """Epochs and minutes until top-1 is `level` percent for the first time; both infinite if it never is."""
        for epoch, minutes, top1 in zip(*self, strict=True):
            if top1 >= level:
                return epoch, minutes
        return math.inf, math.inf


class Run(NamedTuple):
    """A finished run. minutes: of training and validation. wall_minutes: of its process, start included."""

    curve: Curve
    minutes: float
    wall_minutes: float


# Runs


def plain_words(words: Sequence[str], with_net: bool) -> list[str]:
    """The plain script's hyper-parameters for train.py's command line. with_net: all that it gives the net, too. Raises
    UserError for an option that the plain script could not follow.
    """
    args = parse_arguments(None, list(words))
    default = train_parser().get_default
    for name, value in vars(args).items():
        option = f"--{name.replace('_', '-')}"
        if value not in CHOICES.get(name, (value,)):
            raise UserError(f"the plain script has no {option} {value}; give {option} {CHOICES[name][0]} behind `--`")
        if value != default(name) and name not in (*SAME, *OF_NET, *CHOICES, *FREE):
            raise UserError(f"the plain script has no {option}; leave it out, or take --contenders {OURS} alone")
    found = ["--lr", str(make_schedule(args, 1).base)]
    for name in (*SAME, *(OF_NET if with_net else ())):
        value, option = getattr(args, name), f"--{name.replace('_', '-')}"
        if value is True:
            found.append(option)
        elif value is not None and value is not False:
            found += [option, *(str(part) for part in (value if isinstance(value, list | tuple) else [value]))]
    return [*found, "--precision", args.amp or "no", "--channels-last"] if with_net else found


def command(contender: str, seed: int, args: argparse.Namespace, theirs: Sequence[str]) -> list[str]:
    """What is run, but for --output: behind "python"."""
    words = ["--recipe", args.recipe, "--data", args.shards, "--seed", str(seed), *theirs]
    if contender == OURS:
        return [str(ROOT / "train.py"), *words]
    cores = len(args.cores)
    plain = [
        "-m",
        "tools.bench.peers.plain_train",
        "--data",
        str(args.images.absolute()),
        *plain_words(words, contender == PLAIN_BF16),
    ]
    return [*plain, "--workers", str(args.workers or cores), "--threads", str(cores)]


@contextmanager
def pinned(cores: Sequence[int]) -> Iterator[None]:
    """This process, and all that it starts meanwhile, on these cores."""
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, cores)
    except OSError as error:
        raise UserError(f"--cores {' '.join(map(str, cores))}: {error.strerror}; there are {sorted(before)}") from error
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def bring_to_end(folder: Path, words: list[str], cores: Sequence[int], epochs: int) -> None:
    """Do the run in `folder`, unless it is finished there. words: its command, see `command`."""
    finished = folder / "finished.json"
    made = {"command": words, "cores": list(cores)}
    if finished.exists():
        before = json.loads(finished.read_text())
        if {key: before[key] for key in made} != made:
            raise UserError(f"{folder}: was made by another command ({shlex.join(before['command'])}); give another --work")
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
        watch(process, output / "metrics.csv", epochs)
    finally:
        process.kill()
        process.wait()
    seconds = time.perf_counter() - began
    if process.returncode:
        last = (log.read_text(errors="replace").strip().splitlines() or ["nothing said"])[-1]
        raise UserError(f"{log}: the run ended with exit code {process.returncode}: {last}")
    finished.write_text(json.dumps(made | {"wall_seconds": seconds}, indent=1))


def watch(process: subprocess.Popen[bytes], metrics: Path, epochs: int) -> None:
    """Show a run's progress until it ends."""
    with tqdm(total=epochs, unit=" epochs", bar_format="{l_bar}{bar}| {n:.2f} of {total_fmt} epochs [{elapsed}{postfix}]") as bar:
        while process.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            if rows := read_metrics(metrics) if metrics.exists() else []:
                bar.update(float(rows[-1]["epoch"]) - bar.n)
                tops = [row["val_top1"] for row in rows if row["val_top1"]]
                bar.set_postfix_str(f"top-1 {float(tops[-1]):.1%}" if tops else "")


def run_folder(work: Path, contender: str, seed: int) -> Path:
    return work / f"{contender.replace(' ', '-')}-seed{seed}"


# Rows


def read_run(folder: Path) -> Run:
    """Raises UserError for a run without validations."""
    metrics = folder / "run" / "metrics.csv"
    rows = read_metrics(metrics)
    validations = [row for row in rows if row["val_top1"]]
    if not validations:
        raise UserError(f"{metrics}: holds no validation; the images need a split val")
    curve = Curve(
        tuple(float(row["epoch"]) for row in validations),
        tuple(float(row["seconds"]) / 60 for row in validations),
        tuple(100 * float(row["val_top1"]) for row in validations),
    )
    wall = json.loads((folder / "finished.json").read_text())["wall_seconds"]
    return Run(curve, float(rows[-1]["seconds"]) / 60, wall / 60)


def with_moments(metric: str, values: list[float]) -> Iterator[Figure]:
    """A quantity over the seeds; its mean and sample standard deviation too, where all seeds have one."""
    yield Figure(metric, values)
    if all(map(math.isfinite, values)):
        yield Figure(f"{metric}, mean", [mean(values)])
        if len(values) > 1:
            yield Figure(f"{metric}, standard deviation", [stdev(values)])


def figures(runs: Sequence[Run], levels: Sequence[float]) -> Iterator[Figure]:
    """Of one contender, over its seeds."""
    for level in levels:
        reached = [run.curve.reach(level) for run in runs]
        yield Figure(f"runs reaching {level:g} %", [sum(math.isfinite(epochs) for epochs, _ in reached)])
        yield from with_moments(f"epochs to {level:g} %", [epochs for epochs, _ in reached])
        yield from with_moments(f"minutes to {level:g} %", [minutes for _, minutes in reached])
    yield from with_moments("last top-1, %", [run.curve.top1[-1] for run in runs])
    yield from with_moments("minutes", [run.minutes for run in runs])
    yield from with_moments("minutes, start included", [run.wall_minutes for run in runs])


def ratios(ours: Sequence[Run], theirs: Sequence[Run], levels: Sequence[float]) -> Iterator[Figure]:
    """Our times over theirs, seed by seed; to a level, of the seeds with which both reach it, if there are any."""
    for level in levels:
        pairs = [(run.curve.reach(level)[1], other.curve.reach(level)[1]) for run, other in zip(ours, theirs, strict=True)]
        both = [mine / other for mine, other in pairs if math.isfinite(mine) and math.isfinite(other)]
        yield Figure(f"seeds with which both reach {level:g} %", [len(both)])
        if both:
            yield from with_moments(f"minutes to {level:g} %, ratio", both)
    yield from with_moments("minutes, ratio", [run.minutes / other.minutes for run, other in zip(ours, theirs, strict=True)])
    walls = [run.wall_minutes / other.wall_minutes for run, other in zip(ours, theirs, strict=True)]
    yield from with_moments("minutes, start included, ratio", walls)


def report(runs: dict[str, list[Run]], levels: Sequence[float], spec: str, results: Path) -> None:
    """runs: by contender, in the order of the seeds."""
    for contender, found in runs.items():
        for figure in figures(found, levels):
            record(results, "time to accuracy", figure, engine=contender, spec=spec, cache="warm")
    for contender, found in runs.items():
        if contender != OURS and OURS in runs:
            for figure in ratios(runs[OURS], found, levels):
                record(results, "time to accuracy", figure, engine=f"{OURS} / {contender}", spec=spec, cache="warm")


def finished_runs(work: Path, contenders: Sequence[str], seeds: Sequence[int]) -> dict[str, list[Run]]:
    """By contender, those without any run left out; raises UserError where seeds are missing."""
    found = {}
    for contender in contenders:
        folders = [run_folder(work, contender, seed) for seed in seeds]
        missing = [folder for folder in folders if not (folder / "finished.json").exists()]
        if not missing:
            found[contender] = [read_run(folder) for folder in folders]
        elif len(missing) < len(folders):
            raise UserError(f"{missing[0]}: no finished run; start this again without --rows-only, or name other --seeds")
    if not found:
        raise UserError(f"{work}: no finished run there; start this without --rows-only")
    return found


def parser() -> Parser:
    parse = Parser(__doc__)
    parse.add_argument("--shards", required=True, help="folder of shards, for train.py")
    parse.add_argument("--images", required=True, type=Path, help="the same images as a folder with train/ and val/")
    parse.add_argument("--work", required=True, type=Path, help="folder for the runs")
    parse.add_argument("--recipe", default="imagenette")
    parse.add_argument("--contenders", nargs="+", default=CONTENDERS, choices=CONTENDERS, help="all")
    parse.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="0 1 2")
    parse.add_argument("--levels", nargs="+", type=float, default=[80.0, 85.0, 90.0], help="of top-1, percent (80 85 90)")
    parse.add_argument("--cores", nargs="+", type=int, default=sorted(os.sched_getaffinity(0)), help="numbers of cores (all)")
    parse.add_argument("--workers", type=positive, help="of the plain script's DataLoader (the number of cores)")
    parse.add_argument("--rows-only", action="store_true")
    parse.add_argument("--results", type=Path, default=ROOT / "tools" / "bench" / "results" / "accuracy.csv")
    return parse


def split_command(words: list[str]) -> tuple[list[str], list[str]]:
    """Our options, and those behind `--` for train.py. Raises UserError for one that is ours to give."""
    at = words.index("--") if "--" in words else len(words)
    own, theirs = words[:at], words[at + 1 :]
    for option in (word.split("=")[0] for word in theirs):
        if option in GIVEN:
            raise UserError(f"{option} may not stand behind `--`: this program gives it to train.py")
    return own, theirs


def main() -> None:
    own, theirs = split_command(sys.argv[1:])
    args = parser().parse_args(own)
    recipe = parse_arguments(None, ["--recipe", args.recipe, "--data", args.shards, *theirs])
    if not recipe.epochs:
        raise UserError("epochs are compared: give the run's length in --epochs, not --iterations")
    jobs = [(seed, name) for i, seed in enumerate(args.seeds) for name in turn(args.contenders, i)]
    commands = [command(name, seed, args, theirs) for seed, name in jobs]
    if not args.rows_only:
        for number, ((seed, name), words) in enumerate(zip(jobs, commands, strict=True), 1):
            folder = run_folder(args.work, name, seed).absolute()
            print(f"run {number} of {len(jobs)}: {name}, seed {seed}, in {folder}", flush=True)
            bring_to_end(folder, words, args.cores, recipe.epochs)
    runs = finished_runs(args.work, args.contenders, args.seeds)
    net = f"{recipe.arch} at {recipe.image_size}, {recipe.epochs} epochs, batch {recipe.batch_size}"
    spec = f"{args.images.name}, recipe {shlex.join([args.recipe, *theirs])}: {net}; seeds {' '.join(map(str, args.seeds))}"
    with pinned(args.cores):  # so that a row says how many cores there were
        report(runs, args.levels, f"{spec}; {len(args.cores)} cores each", args.results)


def turn(contenders: Sequence[Any], number: int) -> list[Any]:
    """Another one begins in each turn."""
    at = number % len(contenders)
    return [*contenders[at:], *contenders[:at]]


if __name__ == "__main__":
    run_cli(main)
