"""Training runs on one page: python tools/report.py runs/a runs/b --out report.html

One HTML file that needs nothing else: a table of the runs; their loss, top-1 (against epochs and minutes), learning rate,
images/s and waiting over each other; and of each run's net the images of the validation split that it classifies worst and the
classes that it confuses. Runs may be still going: make the page again to see how they do.

The nets are tested on the data that they were trained on, or on --data; with --no-evaluate not at all, which takes a second.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import _path  # noqa: F401

from pipeline.cli import Parser, positive, run_cli
from pipeline.store import files
from tools.evaluate import add_feed_options
from tools.reporting.curves import draw
from tools.reporting.page import html
from tools.reporting.runs import read_runs
from tools.reporting.worst import evaluate_runs


def parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the --output of a train.py")
    parser.add_argument("--out", default="report.html", help="the page (report.html)")
    parser.add_argument("--no-evaluate", action="store_true", help="leave out worst images and confusion")
    parser.add_argument("--data", help="folder or URL (s3://...) of shards to test on (default: each run's own)")
    parser.add_argument("--worst", type=positive, default=16, help="images to show of each run (16)")
    add_feed_options(parser)
    return parser


def main() -> None:
    args = parser().parse_args()
    runs = read_runs(args.runs)
    charts = draw(runs)
    tested = {} if args.no_evaluate else evaluate_runs(runs, args)
    page = html(runs, charts, tested, args.split, datetime.now().strftime("%Y-%m-%d %H:%M"))
    files.write(args.out, page.encode())
    for name, reason in tested.items():
        if isinstance(reason, str):
            print(f"{name}: not tested: {reason}")
    print(f"{args.out} written")


if __name__ == "__main__":
    run_cli(main)
