"""Check what `cropfeed profile --loader` predicts for other loaders: the gain of changing to Cropfeed.

    python tools/bench/bench_foreign.py IMAGES

IMAGES is a folder of class folders of JPEGs, a tar of one, or a folder of shards. For each loader, the profiler predicts the gain
from a sample of the images, as for a user. Then both loaders are measured in turns, in longer runs on all images, as
tools/bench/compare.py measures. Rows go to tools/bench/results/profile.csv. The exit code is 1 if a prediction misses its goal.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from statistics import median

import _path  # noqa: F401

from pipeline.cli import Parser, positive, run_cli
from pipeline.errors import UserError
from pipeline.profile.measure import ProfileOptions, profile
from pipeline.profile.verdict import lines
from tools.bench.peers import data
from tools.bench.peers.compare import CompareOptions, describe, job
from tools.bench.peers.contenders import CONTENDERS, Contender
from tools.bench.peers.job import CONTENDER, LOADER, Job
from tools.bench.peers.turns import measure
from tools.bench.recording import RESULTS, Figure, ratios, record

GOAL = 0.2  # predicted over measured gain differs from 1 by at most this
LOADERS = ("torch-pillow", "webdataset-pillow", "ffcv-jitter")
BY_KEY = {contender.key: contender for contender in CONTENDERS}
OWN = BY_KEY["cropfeed-cpu-lossless:lossless"]


def predict(contender: Contender, own_job: Job, budget: float) -> float:
    """The gain that the profiler predicts for a contender."""
    os.environ[CONTENDER] = json.dumps([contender.function, own_job])
    found = profile(ProfileOptions(LOADER, str(Path(own_job.data) / "images"), geometry="jitter", budget=budget))
    print("\n".join(lines(found)))
    return float(found["gain"]["median"])


def check(contender: Contender, jobs: dict[str, Job], options: CompareOptions, budget: float) -> bool:
    """Predict and measure the gain, and record both. Returns whether the prediction is good."""
    predicted = predict(contender, jobs["original"], budget)
    other, own = measure([contender, OWN], jobs, options.repeats, options.seconds, {}, {})
    if other.error or own.error:
        raise UserError(f"{contender.name}: {other.error or own.error}")
    gains = ratios(own.images_per_s, other.images_per_s)
    ratio = predicted / median(gains)
    figures = Figure("predicted_gain", [predicted]), Figure("measured_gain", gains), Figure("predicted_over_measured", [ratio])
    spec = f"{contender.name}; {describe(options, jobs['original'].images)}"
    record(options.results, "foreign loader", *figures, engine="cpu", spec=spec)
    good = abs(ratio - 1) <= GOAL
    print(f"{contender.name}: {'ok' if good else 'FAILED'}: predicted {predicted:.2f}, measured {median(gains):.2f}", flush=True)
    return good


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("images", type=Path, metavar="IMAGES", help="folder or tar of images, or folder of shards")
    parser.add_argument("--only", nargs="+", default=LOADERS, choices=LOADERS, help="check only these loaders")
    parser.add_argument("--repeats", type=positive, default=5, help="measurements of each loader (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="duration of each measurement (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=180.0, help="seconds of each profile (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS / "profile.csv")
    args = parser.parse_args()
    options = CompareOptions(args.images, args.results, repeats=args.repeats, seconds=args.seconds)
    # sys.exit raises an exception, so that loaders are stopped and temporary files removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    chosen = [BY_KEY[f"{name}:original"] for name in args.only]
    with tempfile.TemporaryDirectory(prefix="cropfeed-foreign-") as name:
        folder, kinds = Path(name), {"original", "lossless"}
        if missing := data.prepare(options.images, folder, kinds, {one.data for one in chosen if one.reads_beton}):
            raise UserError(f"{options.images}: {missing['original']}")
        jobs = {kind: job(folder / kind, options) for kind in kinds}
        good = [check(contender, jobs, options, args.budget) for contender in chosen]
    sys.exit(0 if all(good) else 1)


if __name__ == "__main__":
    run_cli(main)
