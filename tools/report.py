"""Training runs on one page: python tools/report.py runs/a runs/b --out report.html

One self-contained HTML file: a table of the runs; curves of their loss, top-1 (against epochs and minutes), learning rate,
images/s and data wait; and for each run's model the validation images with the lowest probability for their label and the classes
that it confuses. Runs may still be training: make the page again to see their progress.

Each model is evaluated on the data that it was trained on, or on --data. --no-evaluate leaves that out, which takes a second.
Needs the extra `report`: pip install -e '.[report]'
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import _path  # noqa: F401

from pipeline.cli import Parser, positive, run_cli
from pipeline.store import files
from tools.reporting.curves import draw
from tools.reporting.evaluation import add_loading_flags, options_from
from tools.reporting.page import html
from tools.reporting.runs import read_runs
from tools.reporting.worst import evaluate_runs


def parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the --output folder of a train.py run")
    parser.add_argument("--out", default="report.html", help="page to write (default: %(default)s)")
    parser.add_argument("--no-evaluate", action="store_true", help="leave out the worst images and the confusion")
    parser.add_argument("--data", help="folder or URL (s3://...) of shards to evaluate on (default: each run's own)")
    parser.add_argument("--worst", type=positive, default=16, help="images to show for each run (default: %(default)s)")
    add_loading_flags(parser)
    return parser


def main() -> None:
    args = parser().parse_args()
    options = options_from(args)
    runs = read_runs(args.runs)
    charts = draw(runs)
    evaluations = {} if args.no_evaluate else evaluate_runs(runs, options, args.worst)
    page = html(runs, charts, evaluations, options.split, datetime.now().strftime("%Y-%m-%d %H:%M"))
    files.write(args.out, page.encode())
    for name, reason in evaluations.items():
        if isinstance(reason, str):
            print(f"{name}: not evaluated: {reason}")
    print(f"{args.out} written")


if __name__ == "__main__":
    run_cli(main)
