"""The throughput of other input pipelines and of Cropfeed's engines, on the same images.

    python tools/bench/compare.py IMAGES                                           all installed contenders
    python tools/bench/compare.py IMAGES --only dali-roi cropfeed-cpu-lossless     some of them; dali-roi:500 for one kind of data
    python tools/bench/compare.py IMAGES --python-for tf-data=/other/env/bin/python

IMAGES is a folder of class folders of JPEGs, a tar of one, or a folder of shards. Every contender makes the same batches from the
same images on the same cores. tools/bench/peers/compare.py describes the method, and the other modules there hold the contenders'
code and settings. The script uses a temporary folder of about twelve times the size of the images with all contenders, most of it
for those that store pixels (ffcv-raw and slipstream-yuv420), and of about four times without them.

If a contender's package is missing, the table shows the command that installs it. --python-for runs a contender with another
Python interpreter. Rows go to tools/bench/results/compare.csv.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

import _path  # noqa: F401

from pipeline.cli import Parser, positive, run_cli
from pipeline.plan import sampling
from tools.bench.peers.compare import OUT, ROWS, CompareOptions, compare


def python_for(text: str) -> tuple[str, str]:
    """NAME=PYTHON."""
    name, separator, python = text.partition("=")
    if not (name and separator and python):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PYTHON")
    return name, python


def parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("images", type=Path, metavar="IMAGES", help="folder or tar of images, or folder of shards")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="measure only these contenders; NAME:500 for one kind of data"
    )
    parser.add_argument(
        "--python-for", type=python_for, action="append", default=[], metavar="NAME=PYTHON", help="Python that runs a contender"
    )
    parser.add_argument("--out", choices=OUT, default="uint8", help="dtype of batches; float32 also subtracts the mean")
    parser.add_argument("--batch-size", type=positive, default=64, help="images per batch (default: %(default)s)")
    parser.add_argument("--image-size", type=positive, default=sampling.CROP, help="side of the crop (default: %(default)s)")
    parser.add_argument(
        "--scale", type=positive, nargs=2, default=sampling.SCALE, metavar=("LOW", "HIGH"),
        help=f"range of the resized short side (default: {sampling.SCALE[0]} {sampling.SCALE[1]})",
    )  # fmt: skip
    parser.add_argument(
        "--threads", type=positive, default=min(2, len(os.sched_getaffinity(0))),
        help="cores for each contender (default: 2, or 1 where there is only one; stock FFCV needs 2)",
    )  # fmt: skip
    parser.add_argument("--repeats", type=positive, default=5, help="measurements of each contender (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=3.0, help="duration of each measurement (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=ROWS, metavar="FILE", help="CSV file to which rows are appended")
    return parser


def main() -> None:
    args = vars(parser().parse_args())
    only = tuple(name for names in args["only"] for name in names.split(","))
    options = CompareOptions(**args | {"only": only, "scale": tuple(args["scale"]), "python_for": dict(args["python_for"])})
    # sys.exit raises an exception, so that contenders are stopped and temporary files removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    compare(options)


if __name__ == "__main__":
    run_cli(main)
