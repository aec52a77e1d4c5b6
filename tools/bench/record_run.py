"""Record the results of a finished run or of an evaluation.

    python tools/bench/record_run.py runs/latest
    python tools/bench/record_run.py --evaluation figures.json

A run's rows go to tools/bench/results/training.csv: last validation accuracy, minutes (with validation and checkpoints, without
start-up), first and last training loss, and the mean share of time spent waiting for data, all from RUN/metrics.csv and
RUN/config.json. An evaluation's rows go to tools/bench/results/testing.csv: top-1 and top-5 of each testing scheme, for each
model and for their ensemble, from the file that tools/evaluate.py --json wrote.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import _path  # noqa: F401

from pipeline.cli import Parser, run_cli
from pipeline.errors import UserError
from tools.bench.recording import RESULTS, Figure, record
from training.metrics import read_metrics

WITHOUT_SCALE = {"rrc": "random resized crops", "pad": "crops of the padded image"}  # geometries


def record_training(run: Path, results: Path) -> None:
    if not (run / "model.safetensors").is_file():
        raise UserError(f"{run}: no finished run there", "give the --output folder of a finished run of train.py")
    config = json.loads((run / "config.json").read_text())
    figures = [Figure(metric, [value]) for metric, value in training_figures(run / "metrics.csv").items()]
    spec = describe(config["arguments"], config["precision"])
    record(results, "training", *figures, engine=config["engine"], spec=spec, cache="warm", command=shorten(config["command"]))


def training_figures(metrics: Path) -> dict[str, float]:
    """A run's figures by metric. wait_share and images_per_s are means over the log intervals."""
    rows = read_metrics(metrics)
    train = [row for row in rows if row["train_loss"]]
    val = [row for row in rows if row["val_top1"]]
    figures = {"minutes": float(rows[-1]["seconds"]) / 60}
    if train:
        figures |= {"first_train_loss": float(train[0]["train_loss"]), "last_train_loss": float(train[-1]["train_loss"])}
        figures["wait_share"] = mean(float(row["wait_share"]) for row in train)
        figures["images_per_s"] = mean(float(row["images_per_s"]) for row in train)
    if val:
        figures |= {"val_top1": float(val[-1]["val_top1"]), "val_top5": float(val[-1]["val_top5"])}
    return figures


def describe(options: dict[str, Any], precision: str) -> str:
    """A row's spec. options: the arguments in config.json."""
    geometry = "S {}..{}".format(*options["scale"]) if options["scale"] else WITHOUT_SCALE[options["geometry"]]
    sizes = f"{options['start_size']} to {options['image_size']}" if options["start_size"] else options["image_size"]
    length = f"{options['iterations']} iterations" if options["iterations"] else f"{options['epochs']} epochs"
    model = f"{options['arch']} at {sizes}, {geometry}"
    return f"{Path(options['data']).name}, {model}, {length}, precision {precision}"


def record_evaluation(file: Path, results: Path) -> None:
    """Record the top-1 and top-5 rates of an evaluation, those of an ensemble's members first."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as JSON ({error})") from error
    if missing := {"name", "schemes", "data", "split", "precision", "command"} - set(found):
        raise UserError(
            f"{file}: lacks {', '.join(sorted(missing))}", "give a file that tools/evaluate.py --json of this version wrote"
        )
    where = f"{found['data'] or 'saved predictions'}, {found['split']}, precision {found['precision']}"
    command = " ".join(["python", *found["command"]])
    for evaluated in (*found.get("members", ()), found):
        for scheme, rates in evaluated["schemes"].items():
            figures = [Figure(metric, [rates[metric]]) for metric in ("top1", "top5")]
            spec = f"{evaluated['name']}, {where}"
            record(results, scheme, *figures, engine="evaluate.py", spec=spec, cache="warm", command=command)


def shorten(command: Sequence[str]) -> str:
    """The command line with the script's name instead of its path."""
    return " ".join([Path(command[0]).name, *command[1:]])


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, nargs="?", metavar="RUN", help="folder of a finished run of train.py")
    parser.add_argument(
        "--evaluation", type=Path, metavar="FILE", help="file written by tools/evaluate.py --json, instead of RUN"
    )
    parser.add_argument("--results", type=Path, help="file to append rows to (default: in tools/bench/results/)")
    args = parser.parse_args()
    if (args.run is None) == (args.evaluation is None):
        raise UserError("give either RUN or --evaluation", "see --help")
    if args.run:
        record_training(args.run, args.results or RESULTS / "training.csv")
    else:
        record_evaluation(args.evaluation, args.results or RESULTS / "testing.csv")


if __name__ == "__main__":
    run_cli(main)
