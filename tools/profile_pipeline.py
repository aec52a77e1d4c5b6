"""Find out whether the input pipeline is the bottleneck of training, and what to change.

    python tools/profile_pipeline.py DATA                             measure all stages and loaders, and find the slowest stage
    python tools/profile_pipeline.py DATA --arch resnet50             compare with the demand of a model (--precision bf16)
    python tools/profile_pipeline.py DATA --demand 3000               compare with an emulated accelerator of 3000 images/s
    python tools/profile_pipeline.py DATA --demand 3000 --apply       also try the proposed change, and measure its gain
    python tools/profile_pipeline.py DATA --tune                      find the best threads and prefetch depth for train.py
    python tools/profile_pipeline.py DATA --gpus 8 --hosts 16 --demand 3000     plan a cluster: what each host needs
    python tools/profile_pipeline.py --loader MODULE:FUNCTION --images IMAGES   measure any other loader; see --loader X --help

DATA is a folder or URL of shards. It may also be a folder with one folder of JPEGs per class, or a tar of such a folder; these
are first converted to shards in a temporary folder.

The demand is the number of images per second that training could process if data were always ready. Without --arch or --demand,
the loader is measured on its own.

The script prints the verdict (one paragraph) and tables. --json FILE writes all figures, in the format described in
tools/profiler/schema.json. --report FOLDER writes an HTML page with charts, report.html.
"""

from __future__ import annotations

import importlib.util
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import _path  # noqa: F401
import torch

from pipeline import ENGINES, cli
from pipeline.cli import Parser, add_cache_flags, check_writable, positive, run_cli
from pipeline.cores import cores_per_process
from pipeline.errors import UserError
from pipeline.plan.geometry import GEOMETRIES, choose_geometry
from pipeline.spec import INTERPOLATIONS, PRECISIONS, LoaderSpec
from pipeline.store import files
from tools.profiler.convert import shards_of
from tools.profiler.html import write_report
from tools.profiler.options import CACHE_STATES, ProfileOptions
from tools.profiler.planted import Planted
from tools.profiler.profile import profile
from tools.profiler.table import table
from training import tuned
from training.loaders import default_interpolation
from training.options import default_size


@dataclass(frozen=True)
class Command:
    """A command line. threads, prefetch: None for the tuned values. json, report: where to write the profile, None: nowhere."""

    options: ProfileOptions
    threads: int | None
    prefetch: int | None
    json: Path | None
    report: Path | None


def parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("data", metavar="DATA", help="folder or URL (s3://...) of shards, or images")
    parser.add_argument("--split", default="train", help="split to load (default: %(default)s)")

    demand = parser.add_argument_group("demand")
    demand.add_argument("--arch", help="measure the training speed of this model on this machine: one of train.py --list, or "
                        "timm/NAME")  # fmt: skip
    demand.add_argument(
        "--precision", choices=PRECISIONS, default="no", help="precision of training; no is float32 (default: %(default)s)"
    )
    demand.add_argument("--demand", type=float, metavar="IMAGES_PER_S", help="instead of --arch: emulate an accelerator that "
                        "trains at this speed; with --gpus or --hosts: the speed of each GPU")  # fmt: skip

    tasks = parser.add_argument_group("further tasks")
    tasks.add_argument("--apply", action="store_true", help="try the proposed change, and measure its gain")
    tasks.add_argument(
        "--tune", action="store_true", help="find the best threads and prefetch depth in a minute, and save them for train.py"
    )
    tasks.add_argument("--gpus", type=positive, metavar="N", help="plan for hosts with this number of GPUs (default: 1)")
    tasks.add_argument("--hosts", type=positive, metavar="N", help="plan for this number of hosts (default: 1)")
    tasks.add_argument("--plant", type=Planted.parse, metavar="FAULT", help="inject a fault, to test the profiler: reader=MB/S "
                       "limits the storage, model=MS slows training down by so many ms per image, threads=N limits the threads"
                       )  # fmt: skip

    loader = parser.add_argument_group("what to load (use the same options as for train.py)")
    loader.add_argument("--batch-size", type=positive, metavar="N", help="images per batch (default: 64 on a CPU, 256 on a GPU)")
    loader.add_argument("--image-size", type=positive, metavar="N", help="side of the crop, in pixels (default: 224; for "
                        "--arch timm/NAME, the model's own)")  # fmt: skip
    loader.add_argument("--geometry", default="jitter", choices=GEOMETRIES, help="training crops: scale jitter, random resized "
                        "crops (rrc) or crops of the padded image (default: %(default)s)")  # fmt: skip
    loader.add_argument("--scale", type=positive, nargs=2, metavar=("LO", "HI"), help="jitter: range of the short side, in "
                        "pixels (default: 256 480 for crops of 224, in proportion for other sizes)")  # fmt: skip
    loader.add_argument("--interpolation", choices=INTERPOLATIONS, help="filter of the resizing (default: bilinear; for "
                        "--arch timm/NAME, the model's own)")  # fmt: skip
    loader.add_argument("--order", default="full", choices=("full", "blocks"), help="shuffle over the whole data set, or within "
                        "blocks of shards (default: %(default)s)")  # fmt: skip
    loader.add_argument("--engine", default="auto", help=f"what decodes and augments: {', '.join(ENGINES)}, or auto for the "
                        "fastest one on this machine (default: %(default)s)")  # fmt: skip
    loader.add_argument(
        "--threads", type=positive, metavar="N", help="decoding threads (default: as found by --tune, otherwise one per core)"
    )
    loader.add_argument(
        "--prefetch", type=positive, metavar="N", help="batches to prefetch (default: as found by --tune, otherwise 2)"
    )
    add_cache_flags(loader)
    loader.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device that receives the "
                        "batches: cpu, cuda or cuda:N (default: %(default)s)")  # fmt: skip

    how = parser.add_argument_group("how to measure, and where to write")
    how.add_argument("--engines", nargs="+", default=[], choices=ENGINES, metavar="ENGINE", help="engines to compare with the "
                     f"configured one: {', '.join(ENGINES)} (default: all that can run here)")  # fmt: skip
    how.add_argument("--cache-state", default="auto", choices=CACHE_STATES, help="page cache during measurements: warm (images "
                     "are in memory) or cold (images are read from the storage); auto is warm if the split fits into memory "
                     "(default: %(default)s)")  # fmt: skip
    how.add_argument("--repeats", type=positive, default=5, metavar="N", help="repeats of each measurement, at least 2 (default: "
                     "%(default)s)")  # fmt: skip
    how.add_argument("--seconds", type=float, default=0.5, metavar="X", help="duration of each measurement, in seconds (default: "
                     "%(default)s)")  # fmt: skip
    how.add_argument("--budget", type=float, default=180.0, metavar="X", help="seconds that all measurements may take, without "
                     "start-up, --apply and --tune; slow ones have fewer repeats, but at least 2, and smaller batches (default: "
                     "%(default)s)")  # fmt: skip
    how.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this JSON file")
    how.add_argument("--report", type=Path, metavar="FOLDER", help="write an HTML report, report.html, to this folder")
    return parser


def parse(arguments: Sequence[str] | None = None) -> Command:
    """Parse and check a command line, before anything is measured. Raises UserError."""
    args = parser().parse_args(arguments)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {args.device}: torch sees no CUDA GPU", "run python tools/doctor.py to find out why")
    size = args.image_size or default_size(args.arch or "")
    spec = LoaderSpec(
        args.data,
        args.split,
        batch_size=args.batch_size or (256 if args.device.startswith("cuda") else 64),
        image_size=size,
        geometry=choose_geometry(args.geometry, args.scale, size),
        interpolation=args.interpolation or default_interpolation(args.arch or ""),
        order=args.order,
        dtype=PRECISIONS[args.precision],
        device=args.device,
        engine=args.engine,
        cache=args.cache,
        cache_gb=args.cache_gb,
        read_timeout=args.read_timeout,
    )
    same = ("arch", "precision", "demand", "cache_state", "repeats", "seconds", "budget", "apply", "tune", "gpus", "hosts")
    fields: dict[str, Any] = {name: getattr(args, name) for name in same}
    options = ProfileOptions(spec, name=args.data, engines=tuple(args.engines), planted=args.plant, **fields)
    for file in (args.json, args.report and args.report / "report.html", tuned.file() if args.tune else None):
        if file:
            check_writable(file)
    if args.report and importlib.util.find_spec("matplotlib") is None:
        raise UserError("--report needs matplotlib, which is not installed", "pip install -e '.[report]'")
    return Command(options, args.threads, args.prefetch, args.json, args.report)


def run(command: Command) -> dict[str, Any]:
    """The profile, in the format of schema.json."""
    options = command.options
    engines = {options.spec.engine, *(options.engines or ENGINES)}
    with shards_of(str(options.spec.data), beton="ffcv" in engines) as data:
        spec = tuned.with_tuned(replace(options.spec, data=data), command.threads, command.prefetch)
        if options.planted and options.planted.kind == "threads":
            spec = replace(spec, threads=int(options.planted.amount))
        return profile(replace(options, spec=spec))


def main() -> None:
    if any(argument.partition("=")[0] == "--loader" for argument in sys.argv[1:]):
        cli.profile(sys.argv[1:], "python tools/profile_pipeline.py")
        return
    command = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, which removes temporary folders
    if command.options.spec.device == "cpu":
        torch.set_num_threads(cores_per_process())
    found = run(command)
    if command.json:
        files.write(str(command.json), json.dumps(found, indent=1).encode() + b"\n")
    print(table(found))
    if command.report:
        print(f"{write_report(found, command.report)} written")


if __name__ == "__main__":
    run_cli(main)
