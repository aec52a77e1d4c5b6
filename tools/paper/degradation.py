"""The degradation of plain models with depth, and its absence in residual models: figure 4 and table 2 of He et al. 2015.

python tools/paper/degradation.py --data /data/shards --output runs/degradation --seeds 0 1 -- --recipe paper

Runs train.py for every model and seed, with the options after `--`, one run after another, each in its own folder. Then plots
training and validation error against iterations in OUTPUT/figure4.png, and appends the final errors to results/degradation.csv.
To continue after an interruption, start the script again: it keeps finished runs and resumes the interrupted one from its
checkpoint.

The default models are the paper's. Residual models with shortcut option A have as many parameters as the plain models of the same
depth, and with the same seed they start from the same weights.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import _path  # noqa: F401
import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt

from model import ARCHS
from pipeline.cli import Parser, run_cli
from pipeline.errors import UserError
from tools import ROOT  # without a display
from tools.bench.recording import RESULTS, Figure, record
from training.metrics import read_metrics

MODELS = ("plain18", "plain34", "resnet18_a", "resnet34_a")
GIVEN = ("--arch", "--seed", "--output", "--data", "--resume")  # train.py's options that this script sets


class Curves(NamedTuple):
    """One run's errors, 0..1, float64. train: (N, 2) of step and error over the images since the previous row. val: (M, 2) of
    step and error. last_train: training error over the last epoch, or over the whole run if it is shorter."""

    train: npt.NDArray[np.float64]
    val: npt.NDArray[np.float64]
    last_train: float


def train(folder: Path, words: list[str], launch: list[str]) -> None:
    """Start or resume the run in `folder`, unless it has finished. words: train.py's arguments."""
    if (folder / "config.json").exists():
        before = [word for word in json.loads((folder / "config.json").read_text())["command"][1:] if word != "--resume"]
        if before != words:
            raise UserError(f"{folder}: holds a run with other options ({shlex.join(before)})", "give another --output")
    if (folder / "model.safetensors").exists():
        return
    if (folder / "checkpoints" / "last").exists():
        words = [*words, "--resume"]
    elif folder.exists():
        shutil.rmtree(folder)  # stopped before its first checkpoint, so there is nothing to resume
    code = subprocess.run([*launch, str(ROOT / "train.py"), *words], check=False).returncode
    if code:
        raise UserError(f"{folder}: train.py ended with exit code {code}", "start this again to continue")


def read_curves(folder: Path) -> Curves:
    rows = read_metrics(folder / "metrics.csv")
    train = [(int(row["step"]), 1 - float(row["train_top1"])) for row in rows if row["train_top1"]]
    if not train:
        raise UserError(f"{folder / 'metrics.csv'}: contains no training error", "give train.py a smaller --log-every")
    begin = int(rows[-1]["step"]) - round(int(rows[-1]["step"]) / float(rows[-1]["epoch"]))  # of the last epoch
    val = [(int(row["step"]), 1 - float(row["val_top1"])) for row in rows if row["val_top1"]]
    return Curves(
        np.array(train, np.float64),
        np.array(val, np.float64).reshape(-1, 2),
        mean(error for step, error in train if step > begin),
    )


def draw(curves: dict[str, list[Curves]], path: Path) -> None:
    """Plot figure 4: plain models on the left, residual models on the right. Thin lines are the smoothed training error, bold
    lines the validation error. Lines are means over the seeds, shaded areas the range. curves: model's name -> a run per seed."""
    sides = [[arch for arch in curves if arch.startswith("plain")], [arch for arch in curves if not arch.startswith("plain")]]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained", sharey=True)
    for axis, archs in zip(axes, sides, strict=True):
        for number, arch in enumerate(archs):
            color = f"C{number}"
            line(axis, [one.train for one in curves[arch]], color, 0.8, f"{arch}, training", smooth=True)
            if all(len(one.val) for one in curves[arch]):
                line(axis, [one.val for one in curves[arch]], color, 2.2, f"{arch}, validation")
        axis.set(xlabel="iterations", title="plain models" if axis is axes[0] else "residual models")
        axis.grid(alpha=0.3)
        if archs:
            axis.legend()
    axes[0].set_ylabel("top-1 error, %")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def line(axis: Any, runs: list[npt.NDArray[np.float64]], color: str, width: float, label: str, smooth: bool = False) -> None:
    """Plot a model's runs: a line for their mean, and a shaded area from the lowest to the highest. runs: (N, 2) each."""
    steps = runs[0][:, 0]
    errors = 100 * np.stack([run[:, 1] for run in runs])
    if smooth:
        width_of_mean = max(1, len(steps) // 60)
        weights = np.convolve(np.ones(len(steps)), np.ones(width_of_mean), "same")
        errors = np.stack([np.convolve(run, np.ones(width_of_mean), "same") / weights for run in errors])
    axis.plot(steps, errors.mean(0), color=color, linewidth=width, label=label)
    axis.fill_between(steps, errors.min(0), errors.max(0), color=color, alpha=0.15, linewidth=0)


def report(curves: dict[str, list[Curves]], spec: str, results: Path) -> None:
    """Record each model's training and validation error, percent, over the seeds."""
    for arch, runs in curves.items():
        figures = {"train_error_%": [100 * one.last_train for one in runs]}
        if all(len(one.val) for one in runs):
            figures["val_error_%"] = [100 * float(one.val[-1, 1]) for one in runs]
        rows = [Figure(metric, values) for metric, values in figures.items()]
        record(results, arch, *rows, engine="train.py", spec=spec, cache="warm")


def split_command(words: list[str]) -> tuple[list[str], list[str]]:
    """This script's arguments, and those of train.py after `--`. Raises UserError for an option that this script sets."""
    at = words.index("--") if "--" in words else len(words)
    own, training = words[:at], words[at + 1 :]
    for option in (word.split("=")[0] for word in training):
        if option in GIVEN:
            raise UserError(f"{option} is not allowed after `--`: this script sets it for train.py")
    return own, training


def main() -> None:
    own, training = split_command(sys.argv[1:])
    parser = Parser(__doc__)
    parser.add_argument("--data", required=True, help="folder or URL (s3://...) of shards")
    parser.add_argument("--output", required=True, type=Path, help="folder for the runs and the figure")
    parser.add_argument("--nets", nargs="+", default=MODELS, metavar="ARCH", help=f"models (default: {' '.join(MODELS)})")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="seeds to train with (default: 0 1)")
    parser.add_argument("--launch", default=sys.executable, help="command that starts train.py (default: python)")
    parser.add_argument("--results", type=Path, default=RESULTS / "degradation.csv")
    args = parser.parse_args(own)
    for arch in args.nets:
        if arch not in ARCHS:
            raise UserError(f"unknown model {arch!r}", f"choose from {', '.join(ARCHS)}")
    jobs = [(seed, arch) for seed in args.seeds for arch in args.nets]
    for number, (seed, arch) in enumerate(jobs, 1):
        folder = (args.output / f"{arch}-seed{seed}").absolute()
        print(f"run {number} of {len(jobs)}: {arch}, seed {seed}, in {folder}", flush=True)
        words = ["--data", args.data, "--arch", arch, "--seed", str(seed), "--output", str(folder), *training]
        train(folder, words, shlex.split(args.launch))
    curves = {arch: [read_curves(args.output / f"{arch}-seed{seed}") for seed in args.seeds] for arch in args.nets}
    draw(curves, args.output / "figure4.png")
    report(curves, f"{Path(args.data).name}, seeds {' '.join(map(str, args.seeds))}, {shlex.join(training)}", args.results)
    print(f"{args.output / 'figure4.png'} written")


if __name__ == "__main__":
    run_cli(main)
