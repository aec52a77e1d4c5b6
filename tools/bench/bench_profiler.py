"""Check the profiler's verdicts, predictions and tuned settings against measurements.

    python tools/bench/bench_profiler.py DATA

    faults    plants each fault in FAULTS and tries the remedy (--apply): does the profiler name the cause, and predict the gain?
    tuning    runs --tune, then measures every setting of its grid in turns: how close is the chosen setting to the best one?

Rows go to tools/bench/results/profile.csv. The exit code is 1 if a cause is not named or a figure misses its goal.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import _path  # noqa: F401

from pipeline.cli import Parser, run_cli
from pipeline.cores import cores_per_process
from pipeline.errors import UserError
from pipeline.spec import LoaderSpec
from tools import ROOT
from tools.bench.recording import RESULTS, Figure, record
from tools.profiler.loaders import grid, measure_loaders
from tools.profiler.profile import PREFETCHES

PREDICTED = 0.2  # goal: predicted over measured gain differs from 1 by at most this
TUNED = 0.95  # goal: throughput of the chosen setting over that of the best
MINUTE = 60.0
REPEATS = 5


@dataclass(frozen=True)
class Fault:
    """options: for profile_pipeline.py. The verdict must name the limit, the stage and one of the remedies."""

    name: str
    options: tuple[str, ...]
    limit: str
    stage: str
    remedies: tuple[str, ...]


FAULTS = (
    Fault("storage of 20 MB/s", ("--plant", "reader=20", "--demand", "3000"), "input", "read warm", ("cache",)),
    Fault("one decode thread", ("--plant", "threads=1", "--demand", "3000"), "input", "decode", ("threads",)),
    Fault("one decode thread, nothing trains", ("--plant", "threads=1"), "input", "decode", ("threads",)),
    Fault("train step 4 ms an image slower", ("--plant", "model=4", "--demand", "3000"), "compute", "model", ("device",)),
    Fault("resnet18 in float32", ("--arch", "resnet18", "--batch-size", "32"), "compute", "model", ("precision", "device")),
)


def profile(data: str, *options: str) -> Any:
    """Run the profiler; returns its JSON."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "profile.json"
        script = str(ROOT / "tools" / "profile_pipeline.py")
        command = [sys.executable, script, data, "--json", str(file), "--engines", "cpu", *options]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if result.returncode:
            raise UserError(f"{' '.join(command)}: exit code {result.returncode}")
        return json.loads(file.read_text())


def check_fault(fault: Fault, data: str, results: Path) -> bool:
    """Plant a fault and record the predicted and the measured gain. Returns whether the cause and the prediction are right."""
    found = profile(data, *fault.options, "--apply")
    verdict, applied = found["verdict"], found["applied"]
    named = (verdict["limit"], verdict["stage"]) == (fault.limit, fault.stage) and verdict["remedy"] in fault.remedies
    print(f"{fault.name}: {verdict['text']}")
    if applied["measured_gain"] is None:
        print(f"{fault.name}: FAILED, its remedy was not tried: {applied['error']}")
        return False
    ratio = verdict["predicted_gain"] / applied["measured_gain"]
    spec = f"{fault.name}; {verdict['change']}"
    predicted, measured = Figure("predicted_gain", [verdict["predicted_gain"]]), Figure("measured_gain", applied["gains"])
    figures = predicted, measured, Figure("predicted_over_measured", [ratio])
    record(results, "planted fault", *figures, engine=found["engine"], spec=spec, cache=found["data"]["cache"])
    good = named and abs(ratio - 1) <= PREDICTED
    print(f"{fault.name}: {'ok' if good else 'FAILED'}: {verdict['limit']}, {verdict['stage']}, {verdict['remedy']}; {ratio:.2f}")
    return good


def check_tuning(data: str, results: Path) -> bool:
    """Record the chosen setting's throughput over the best one's. Returns whether the goals are reached."""
    tuned = profile(data, "--tune", "--repeats", "2", "--seconds", "0.1")["tuned"]
    spec = LoaderSpec(data, batch_size=64, engine="cpu")
    threads = sorted({1, cores_per_process(), tuned["threads"]})
    loaders = measure_loaders(grid(spec, [spec.engine], threads, PREFETCHES), False, 2 * REPEATS, 1.0, "every setting")
    # The first half of the repeats selects the best setting, and the second half compares with it. If all repeats did both, noise
    # would favour the best of several equal settings.
    best = max(loaders, key=lambda loader: median(loader.speeds[:REPEATS]))
    setting = (tuned["threads"], tuned["prefetch"])
    chosen = next(loader for loader in loaders if (loader.spec.threads, loader.spec.prefetch) == setting)
    ratios = chosen.ratios(best)[REPEATS:]
    figures = Figure("chosen_over_best", ratios), Figure("seconds", [tuned["seconds"]])
    described = f"{tuned['threads']} threads, prefetch {tuned['prefetch']}"
    record(results, "tuning", *figures, engine="cpu", spec=described, cache="warm")
    good = median(ratios) >= TUNED and tuned["seconds"] < MINUTE
    print(f"tuning: {'ok' if good else 'FAILED'}: {median(ratios):.3f} of the best, in {tuned['seconds']:.0f} s")
    return good


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("data", metavar="DATA", help="folder of shards")
    parser.add_argument("--results", type=Path, default=RESULTS / "profile.csv")
    parser.add_argument("--only", choices=("faults", "tuning"), help="do only this part")
    args = parser.parse_args()
    good = []
    if args.only != "tuning":
        good += [check_fault(fault, args.data, args.results) for fault in FAULTS]
    if args.only != "faults":
        good.append(check_tuning(args.data, args.results))
    sys.exit(0 if all(good) else 1)


if __name__ == "__main__":
    run_cli(main)
