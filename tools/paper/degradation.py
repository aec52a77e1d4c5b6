"""The degradation of plain nets, and what residual learning does to it: figure 4 and table 2 of He et al. 2015.

python tools/paper/degradation.py --data /data/shards --output runs/degradation --seeds 0 1 -- --recipe paper

Trains every net with every seed by train.py, all with the options behind `--`, one run after another, each in a folder of its
own. Then writes OUTPUT/figure4.png, training and validation error against iterations, and appends what the runs reached to
results/degradation.csv. Start it again after a stop: finished runs are kept, a stopped one goes on from its checkpoint.

The default nets are the paper's: residual nets with shortcut option A have no parameter more than their plain twins, and at the
same seed start from the same weights.
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
import matplotlib

from tools import ROOT

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt

from model import ARCHS
from pipeline.cli import Parser, run_cli
from pipeline.errors import UserError
from tools.bench.recording import Figure, record
from training.metrics import read_metrics

NETS = ("plain18", "plain34", "resnet18_a", "resnet34_a")
OWN = ("--arch", "--seed", "--output", "--data", "--resume")  # train.py's options that are given here


class Curves(NamedTuple):
    """One run's errors, 0..1, float64. train: (N, 2), step and error of the images since the row before. val: (M, 2), step and
    error. last_train: training error over the last epoch (or the whole run, if shorter)."""

    train: npt.NDArray[np.float64]
    val: npt.NDArray[np.float64]
    last_train: float


def train(folder: Path, words: list[str], launch: list[str]) -> None:
    """Bring the run in `folder` to its end: nothing to do, to go on with, or to begin. words: train.py's arguments."""
    if (folder / "config.json").exists():
        before = [word for word in json.loads((folder / "config.json").read_text())["command"][1:] if word != "--resume"]
        if before != words:
            raise UserError(f"{folder}: was made with other options ({shlex.join(before)}); give another --output")
    if (folder / "model.safetensors").exists():
        return
    if (folder / "checkpoints" / "last").exists():
        words = [*words, "--resume"]
    elif folder.exists():
        shutil.rmtree(folder)  # stopped before its first checkpoint: there is nothing to go on with
    code = subprocess.run([*launch, str(ROOT / "train.py"), *words], check=False).returncode
    if code:
        raise UserError(f"{folder}: train.py ended with exit code {code}; start this again to go on")


def read_curves(folder: Path) -> Curves:
    rows = read_metrics(folder / "metrics.csv")
    train = [(int(row["step"]), 1 - float(row["train_top1"])) for row in rows if row["train_top1"]]
    if not train:
        raise UserError(f"{folder / 'metrics.csv'}: holds no training error; give train.py a smaller --log-every")
    begin = int(rows[-1]["step"]) - round(int(rows[-1]["step"]) / float(rows[-1]["epoch"]))  # of the last epoch
    val = [(int(row["step"]), 1 - float(row["val_top1"])) for row in rows if row["val_top1"]]
    return Curves(
        np.array(train, np.float64),
        np.array(val, np.float64).reshape(-1, 2),
        mean(error for step, error in train if step > begin),
    )


def draw(curves: dict[str, list[Curves]], picture: Path) -> None:
    """Figure 4: plain nets left, residual nets right. Thin: training error, smoothed. Bold: validation error. Means over seeds,
    with the seeds' range behind them."""
    sides = [[net for net in curves if net.startswith("plain")], [net for net in curves if not net.startswith("plain")]]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained", sharey=True)
    for axis, nets in zip(axes, sides, strict=True):
        for number, net in enumerate(nets):
            color = f"C{number}"
            line(axis, [one.train for one in curves[net]], color, 0.8, f"{net}, training", smooth=True)
            if all(len(one.val) for one in curves[net]):
                line(axis, [one.val for one in curves[net]], color, 2.2, f"{net}, validation")
        axis.set(xlabel="iterations", title="plain nets" if axis is axes[0] else "residual nets")
        axis.grid(alpha=0.3)
        if nets:
            axis.legend()
    axes[0].set_ylabel("top-1 error, %")
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def line(axis: Any, runs: list[npt.NDArray[np.float64]], color: str, width: float, label: str, smooth: bool = False) -> None:
    """A net's runs as one line, their mean, and the area between the lowest and the highest."""
    steps = runs[0][:, 0]
    errors = 100 * np.stack([run[:, 1] for run in runs])
    if smooth:
        reach = max(1, len(steps) // 60)
        weights = np.convolve(np.ones(len(steps)), np.ones(reach), "same")
        errors = np.stack([np.convolve(run, np.ones(reach), "same") / weights for run in errors])
    axis.plot(steps, errors.mean(0), color=color, linewidth=width, label=label)
    axis.fill_between(steps, errors.min(0), errors.max(0), color=color, alpha=0.15, linewidth=0)


def report(curves: dict[str, list[Curves]], spec: str, results: Path) -> None:
    """A row for each net's training and validation error, percent, over the seeds."""
    for net, runs in curves.items():
        figures = {"train_error_%": [100 * one.last_train for one in runs]}
        if all(len(one.val) for one in runs):
            figures["val_error_%"] = [100 * float(one.val[-1, 1]) for one in runs]
        for metric, values in figures.items():
            record(results, net, Figure(metric, values), engine="train.py", spec=spec, cache="warm")


def split_command(words: list[str]) -> tuple[list[str], list[str]]:
    """Our options, and those behind `--` for train.py. Raises UserError for one that is ours to give."""
    at = words.index("--") if "--" in words else len(words)
    ours, theirs = words[:at], words[at + 1 :]
    for word in theirs:
        if word.split("=")[0] in OWN:
            raise UserError(f"{word.split('=')[0]} belongs before `--`: this program gives it to train.py")
    return ours, theirs


def main() -> None:
    ours, theirs = split_command(sys.argv[1:])
    parser = Parser(__doc__)
    parser.add_argument("--data", required=True, help="folder or URL (s3://...) of shards")
    parser.add_argument("--output", required=True, type=Path, help="folder of the runs and the figure")
    parser.add_argument("--nets", nargs="+", default=NETS, help=" ".join(NETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--launch", default=sys.executable, help="what starts train.py, such as 'accelerate launch' (python)")
    parser.add_argument("--results", type=Path, default=ROOT / "tools" / "bench" / "results" / "degradation.csv")
    args = parser.parse_args(ours)
    for net in args.nets:
        if net not in ARCHS:
            raise UserError(f"unknown net {net!r}; choose from {', '.join(ARCHS)}")
    jobs = [(seed, net) for seed in args.seeds for net in args.nets]
    for number, (seed, net) in enumerate(jobs, 1):
        folder = (args.output / f"{net}-seed{seed}").absolute()
        print(f"run {number} of {len(jobs)}: {net}, seed {seed}, in {folder}", flush=True)
        words = ["--data", args.data, "--arch", net, "--seed", str(seed), "--output", str(folder), *theirs]
        train(folder, words, shlex.split(args.launch))
    curves = {net: [read_curves(args.output / f"{net}-seed{seed}") for seed in args.seeds] for net in args.nets}
    draw(curves, args.output / "figure4.png")
    report(curves, f"{Path(args.data).name}, seeds {' '.join(map(str, args.seeds))}, {shlex.join(theirs)}", args.results)
    print(f"{args.output / 'figure4.png'} written")


if __name__ == "__main__":
    run_cli(main)
