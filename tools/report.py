"""Compare training runs on one HTML page: python tools/report.py runs/a runs/b --out report.html

The page is one self-contained file. It contains a table of the runs; curves of loss, top-1 accuracy (over epochs and minutes),
learning rate, images/s and data wait; and for each run the classes that its model confuses, the validation images with the lowest
probability for their label, and the first crops of the training. Runs may still be training: run the script again to see their
progress.

Each model is evaluated on the validation images of its training data, or on --data. With --no-evaluate, the page has no
confusions and images, but takes only a second.

Needs the extra `report`: pip install -e '.[report]'
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import _path  # noqa: F401

from pipeline.cli import Parser, check_writable, positive, run_cli
from pipeline.progress import announce_if_slow
from pipeline.store import files
from tools.reporting.curves import draw
from tools.reporting.evaluation import add_loading_flags, options_from
from tools.reporting.page import html
from tools.reporting.runs import read_runs
from tools.reporting.worst import evaluate_runs


def parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run (--output of train.py)")
    parser.add_argument("--out", default="report.html", metavar="FILE", help="page to write (default: %(default)s)")
    parser.add_argument("--no-evaluate", action="store_true", help="do not evaluate the models: no confusions, no images")
    parser.add_argument("--data", metavar="SHARDS", help="folder or URL (s3://...) of shards to evaluate on (default: each run's "
                        "training data)")  # fmt: skip
    parser.add_argument("--worst", type=positive, default=16, metavar="N", help="images to show for each run, those with the "
                        "lowest probability for their label (default: %(default)s)")  # fmt: skip
    add_loading_flags(parser)
    return parser


def main() -> None:
    args = parser().parse_args()
    options = options_from(args)
    runs = read_runs(args.runs)
    if not files.is_remote(args.out):
        check_writable(Path(args.out))
    with announce_if_slow("drawing the curves, a few seconds for each run"):
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
