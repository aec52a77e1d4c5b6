"""Is the input pipeline the bottleneck, and what should be changed?

    python tools/profile_pipeline.py DATA                             every stage, every loader; what limits them
    python tools/profile_pipeline.py DATA --arch resnet50             against what that net eats here; --precision bf16
    python tools/profile_pipeline.py DATA --demand 3000               against an emulated accelerator of so many images/s
    python tools/profile_pipeline.py DATA --demand 3000 --apply       try the remedy; predicted against measured gain
    python tools/profile_pipeline.py DATA --tune                      find threads and prefetch depth, for train.py
    python tools/profile_pipeline.py DATA --gpus 8 --hosts 16 --demand 3000     what such a cluster needs
    python tools/profile_pipeline.py DATA --compare [IMAGES]          every peer and every engine of ours

DATA is a folder or URL of shards; of a folder of class folders of JPEGs, or a tar of one, shards are made in a temporary
folder. The answer is a paragraph and tables; --json FILE writes all figures (tools/profiler/schema.json describes them),
--report FOLDER a page for people, report.html, with its pictures.

--compare: IMAGES (by default DATA's) is a folder of class folders of JPEGs, or a tar of one. Every contender makes the same
batches from the same images on the same cores (see tools/bench/peers/: compare.py for the method, the others for each contender's
code and settings). It works in a temporary folder of about four times the images' bytes. Contenders whose package is missing
are named, with what installs it; those that need a Python of their own get it by --python-for (it must hold psutil, too).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import _path  # noqa: F401
import torch

from model import ARCHS
from pipeline import ENGINES
from pipeline.cli import Parser, positive, run_cli
from pipeline.errors import UserError
from pipeline.plan import sampling
from pipeline.plan.geometry import GEOMETRIES, choose_geometry
from pipeline.spec import PRECISIONS, LoaderSpec
from pipeline.store import files
from tools import ROOT
from tools.bench.peers.compare import Options as CompareOptions
from tools.bench.peers.compare import compare
from tools.bench.peers.data import write_files
from tools.profiler.html import write_report
from tools.profiler.planted import Planted
from tools.profiler.profile import Options, profile, shards_of
from tools.profiler.table import table
from training import tuned
from training.launch import cores_per_process


def above_zero(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return value


def repeats(text: str) -> int:
    """A number of repeats that has a spread."""
    value = positive(text)
    if value < 2:
        raise argparse.ArgumentTypeError("must be at least 2, for an interval")
    return value


def python_for(text: str) -> tuple[str, str]:
    """NAME=PYTHON."""
    name, separator, python = text.partition("=")
    if not (name and separator and python):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PYTHON")
    return name, python


def parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("data", nargs="?", metavar="DATA", help="shards, or images")
    parser.add_argument("--split", default="train")

    demand = parser.add_argument_group("demand")
    demand.add_argument("--arch", help=f"a net to train: {', '.join(ARCHS)}")
    demand.add_argument("--precision", choices=PRECISIONS, default="no", help="of its training (default: no, which is float32)")
    demand.add_argument("--demand", type=above_zero, metavar="IMAGES_PER_S", help="of an accelerator; with --gpus, of each")

    tasks = parser.add_argument_group("what else to do")
    tasks.add_argument("--apply", action="store_true", help="try the remedy and measure its gain")
    tasks.add_argument("--tune", action="store_true", help="find threads and prefetch depth, and keep them for train.py")
    tasks.add_argument("--gpus", type=positive, help="of a host, to plan for")
    tasks.add_argument("--hosts", type=positive, help="to plan for")
    tasks.add_argument("--plant", type=Planted.parse, metavar="FAULT", help="reader=MB/S, model=MS or threads=N, to see it found")

    loader = parser.add_argument_group("what is loaded, as train.py has it")
    loader.add_argument("--batch-size", type=positive, help="default: 64 on a CPU and for --compare, 256 on a GPU")
    loader.add_argument("--image-size", type=positive, default=sampling.CROP, help="side of the crop (default: %(default)s)")
    loader.add_argument("--geometry", default="jitter", choices=GEOMETRIES)
    loader.add_argument("--scale", type=positive, nargs=2, metavar=("LOW", "HIGH"), help="range of S (256 480 at size 224)")
    loader.add_argument("--order", default="full", choices=("full", "blocks"))
    loader.add_argument("--engine", default="auto", help=", ".join(("auto", *ENGINES)))
    loader.add_argument("--threads", type=positive, help="default: as tuned, else all cores; with --compare: cores for each (2)")
    loader.add_argument("--prefetch", type=positive, help="batches made ahead (default: as tuned, else 2)")
    loader.add_argument("--cache", type=Path, help="folder for copies of remote shards, or of ones on a slow disk")
    loader.add_argument("--cache-gb", type=above_zero, help="its bound")
    loader.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")

    how = parser.add_argument_group("how it is measured, and where figures go")
    how.add_argument(
        "--engines", nargs="+", default=[], choices=ENGINES, help="to measure beside the one used (default: all here)"
    )
    how.add_argument("--cache-state", default="auto", choices=("auto", "warm", "cold"), help="of the page cache")
    how.add_argument("--repeats", type=repeats, default=5, help="turns of each (default: %(default)s)")
    how.add_argument("--seconds", type=above_zero, help="of a turn (default: 0.5; with --compare 3)")
    how.add_argument("--json", type=Path, metavar="FILE")
    how.add_argument("--report", type=Path, metavar="FOLDER")

    peers = parser.add_argument_group("comparison")
    peers.add_argument("--compare", nargs="?", const="", metavar="IMAGES", help="measure input pipelines on these images")
    peers.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these contenders; NAME:500 on one kind of data")
    peers.add_argument("--results", type=Path, default=ROOT / "tools" / "bench" / "results" / "compare.csv")
    peers.add_argument("--out", choices=("uint8", "float32"), default="uint8", help="of batches; float32: mean subtracted")
    peers.add_argument("--python-for", type=python_for, action="append", default=[], metavar="NAME=PYTHON")
    return parser


def check(args: Any) -> None:
    """Raise UserError before minutes are spent on what cannot end well."""
    if args.data is None and not args.compare:
        raise UserError("give DATA, shards or images to profile, or --compare IMAGES; see --help")
    if args.arch and args.arch not in ARCHS:
        raise UserError(f"unknown --arch {args.arch!r}; choose from {', '.join(ARCHS)}")
    if args.arch and args.demand and not (args.gpus or args.hosts):
        raise UserError("--arch is measured, --demand is given: take one of them")
    if args.data is None and (args.report or args.apply or args.tune or args.gpus or args.hosts or args.arch or args.demand):
        raise UserError("--compare alone compares; for all else give DATA, too")
    if (args.gpus or args.hosts) and not (args.arch or args.demand):
        raise UserError("--gpus and --hosts need to know what a GPU eats: give --demand IMAGES_PER_S, or --arch on a GPU")
    choose_geometry(args.geometry, args.scale, args.image_size)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {args.device}: torch sees no CUDA GPU; python tools/doctor.py says why")
    for file in (args.json, args.report and args.report / "report.html", tuned.file() if args.tune else None):
        if file:
            check_writable(file)
    if args.report and importlib.util.find_spec("matplotlib") is None:
        raise UserError("--report draws with matplotlib, which is not installed: pip install -e '.[dev]'")


def check_writable(file: Path) -> None:
    """Raise UserError if a file could not be written in the end; its folder is made."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{file.parent}: cannot be made ({error.strerror}); name another place") from error
    if file.is_dir():
        raise UserError(f"{file}: is a folder; name a file")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise UserError(f"{file}: cannot be written; name another place")


def profile_options(args: Any, data: str) -> Options:
    planted = args.plant
    spec = LoaderSpec(
        data,
        args.split,
        batch_size=args.batch_size or (256 if args.device.startswith("cuda") else 64),
        image_size=args.image_size,
        geometry=choose_geometry(args.geometry, args.scale, args.image_size),
        order=args.order,
        dtype=PRECISIONS[args.precision],
        device=args.device,
        engine=args.engine,
        cache=args.cache,
        cache_gb=args.cache_gb,
    )
    spec = tuned.with_tuned(spec, args.threads, args.prefetch)
    if planted and planted.kind == "threads":
        spec = replace(spec, threads=int(planted.amount))
    return Options(
        name=args.data,
        spec=spec,
        arch=args.arch,
        precision=args.precision,
        demand=args.demand,
        cache=args.cache_state,
        engines=tuple(args.engines),
        repeats=args.repeats,
        seconds=args.seconds or 0.5,
        apply=args.apply,
        tune=args.tune,
        gpus=args.gpus,
        hosts=args.hosts,
        planted=planted,
    )


def run_comparison(args: Any, images: Path) -> dict[str, Any]:
    low, high = args.scale or sampling.SCALE
    return compare(
        CompareOptions(
            images=images,
            results=args.results,
            repeats=args.repeats,
            seconds=args.seconds or 3.0,
            batch_size=args.batch_size or 64,
            only=tuple(name for names in args.only for name in names.split(",")),
            out=args.out,
            size=args.image_size,
            scale=(low, high),
            threads=args.threads or 2,
            pythons=dict(args.python_for),
        )
    )


def compare_on(args: Any, data: str) -> dict[str, Any]:
    """The comparison on DATA's own images. data: its shards."""
    if data != args.data:
        return run_comparison(args, Path(args.data))
    with tempfile.TemporaryDirectory(prefix="cropfeed-profile-") as folder:
        write_files(Path(data), Path(folder), lambda jpeg: jpeg.tobytes())
        return run_comparison(args, Path(folder))


def run_all(args: Any) -> dict[str, Any]:
    """What is asked for, in the schema's form; of a comparison alone, its part."""
    found: dict[str, Any] = {}
    if args.data is not None:
        with shards_of(args.data, beton=args.engine == "ffcv" or "ffcv" in (args.engines or ENGINES)) as data:
            found = profile(profile_options(args, data))
            if args.compare is not None:
                found |= run_comparison(args, Path(args.compare)) if args.compare else compare_on(args, data)
    else:
        found = run_comparison(args, Path(args.compare))
    return found


def main() -> None:
    args = parser().parse_args()
    check(args)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception: contenders and temporary files go
    if args.device == "cpu":
        torch.set_num_threads(cores_per_process())
    found = run_all(args)
    if args.json:
        files.write(str(args.json), json.dumps(found, indent=1).encode() + b"\n")
    if "verdict" in found:
        print(table({name: part for name, part in found.items() if name != "rows"}))  # `compare` has printed its own
        if args.report:
            print(f"{write_report(found, args.report)} written")


if __name__ == "__main__":
    run_cli(main)
