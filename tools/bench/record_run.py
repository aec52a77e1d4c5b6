"""Record what a finished run reached: python tools/bench/record_run.py runs/latest

Appends rows to tools/bench/results/training.csv: last validation accuracy, minutes (validation and checkpoints included, start-up
not), first and last training loss, share of the time spent waiting for data, all from RUN/metrics.csv and RUN/config.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

import _path  # noqa: F401

from pipeline.cli import Parser, run_cli
from pipeline.errors import UserError
from tools import ROOT
from tools.bench.recording import Figure, record
from training.metrics import read_metrics

WORDS = {"rrc": "random resized crops", "pad": "crops of the padded image"}  # geometries without a scale


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--results", type=Path, default=ROOT / "tools" / "bench" / "results" / "training.csv")
    args = parser.parse_args()
    if not (args.run / "model.safetensors").is_file():
        raise UserError(f"{args.run}: no finished run there; give the --output of a train.py that has ended")
    config = json.loads((args.run / "config.json").read_text())
    options = config["arguments"]
    rows = read_metrics(args.run / "metrics.csv")
    train = [row for row in rows if row["train_loss"]]
    val = [row for row in rows if row["val_top1"]]
    figures = {"minutes": float(rows[-1]["seconds"]) / 60}
    if train:
        figures |= {"first_train_loss": float(train[0]["train_loss"]), "last_train_loss": float(train[-1]["train_loss"])}
        figures["wait_share"] = mean(float(row["wait_share"]) for row in train)
        figures["images_per_s"] = mean(float(row["images_per_s"]) for row in train)
    if val:
        figures |= {"val_top1": float(val[-1]["val_top1"]), "val_top5": float(val[-1]["val_top5"])}
    geometry = "S {}..{}".format(*options["scale"]) if options["scale"] else WORDS[options["geometry"]]
    sizes = f"{options['start_size']} to {options['image_size']}" if options["start_size"] else options["image_size"]
    net = f"{options['arch']} at {sizes}, {geometry}"
    length = f"{options['iterations']} iterations" if options["iterations"] else f"{options['epochs']} epochs"
    spec = f"{Path(options['data']).name}, {net}, {length}, precision {config['precision']}"
    command = " ".join(Path(part).name if i == 0 else part for i, part in enumerate(config["command"]))
    for metric, value in figures.items():
        record(
            args.results, "training", Figure(metric, [value]), engine=config["engine"], spec=spec, cache="warm", command=command
        )


if __name__ == "__main__":
    run_cli(main)
