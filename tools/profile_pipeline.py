"""Input pipelines, measured.

    python tools/profile_pipeline.py --compare IMAGES                          every peer and every engine of ours
    python tools/profile_pipeline.py --compare IMAGES --only dali-roi cropfeed-cpu-lossless
    python tools/profile_pipeline.py --compare IMAGES --python-for tf-data=/envs/tf/bin/python

--compare: IMAGES is a folder of class folders of JPEGs, or a tar of one. Every contender makes the same batches from the same
images on the same cores (see tools/peers/compare.py for the method, tools/peers/ for each contender's code and settings): short
side resized to S, uniform in 256..480, a 224 crop at a uniform place, flipped half the time. It works in a temporary folder of
about four times the images' bytes. Contenders whose package is missing are named, with what installs it; those that need a Python
of their own get it by --python-for (it must hold psutil, too).
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

import _path
from peers.compare import Options, compare

from pipeline import plan
from pipeline.errors import Parser, positive, run_cli


def seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return value


def python_for(text: str) -> tuple[str, str]:
    """NAME=PYTHON."""
    name, separator, python = text.partition("=")
    if not (name and separator and python):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PYTHON")
    return name, python


def parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--compare", type=Path, metavar="IMAGES", required=True, help="measure input pipelines on these images")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these contenders; NAME:500 on one kind of data")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    parser.add_argument("--results", type=Path, default=_path.ROOT / "tools" / "results" / "compare.csv")
    parser.add_argument("--repeats", type=positive, default=5, help="turns of each contender (default: %(default)s)")
    parser.add_argument("--seconds", type=seconds, default=3.0, help="of a turn (default: %(default)s)")
    parser.add_argument("--batch-size", type=positive, default=64, help="default: %(default)s")
    parser.add_argument("--out", choices=("uint8", "float32"), default="uint8", help="of batches; float32: mean subtracted")
    parser.add_argument("--image-size", type=positive, default=plan.CROP, help="side of the crop (default: %(default)s)")
    parser.add_argument("--scale", type=positive, nargs=2, default=plan.SCALE, metavar=("LOW", "HIGH"), help="range of S")
    parser.add_argument("--threads", type=positive, default=2, help="cores, and threads or workers (default: %(default)s)")
    parser.add_argument(
        "--python-for", type=python_for, action="append", default=[], metavar="NAME=PYTHON", help="run NAME in another Python"
    )
    return parser


def main() -> None:
    args = parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception: contenders and temporary files go
    low, high = args.scale
    compare(
        Options(
            images=args.compare,
            json=args.json,
            results=args.results,
            repeats=args.repeats,
            seconds=args.seconds,
            batch_size=args.batch_size,
            only=tuple(name for names in args.only for name in names.split(",")),
            out=args.out,
            size=args.image_size,
            scale=(low, high),
            threads=args.threads,
            pythons=dict(args.python_for),
        )
    )


if __name__ == "__main__":
    run_cli(main)
