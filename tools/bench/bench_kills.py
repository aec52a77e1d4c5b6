"""Check that a conversion survives SIGKILL at any moment: python tools/bench/bench_kills.py IMAGES --kills 100

Converts IMAGES (any source that make_shards.py accepts) once without interruption. Then converts it again and kills the whole
process group with SIGKILL, --kills times. Each kill comes after a random number of further shards (none: during start-up) and a
random delay, so that the kills are spread over the whole conversion. The last kills come while the data set is being completed.

After each kill, every file that a reader can see must be complete and equal to that of the uninterrupted run. At the end, all
files must be there. Rows go to tools/bench/results/kills.csv.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import _path  # noqa: F401
import numpy as np
from tqdm import tqdm

from pipeline.cli import Parser, positive, run_cli
from pipeline.errors import UserError
from tools import ROOT
from tools.bench.recording import RESULTS, Figure, record

STARTING, WORKING = 1.5, 0.02  # seconds: longest random delay of a kill during start-up, and after a shard


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file that a reader sees, by name: without hidden files and the converter's own records."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".") and path.relative_to(folder).parts[0] != "conversion"
    }


def start(images: Path, out: Path, shard_size: int) -> subprocess.Popen[bytes]:
    script = ROOT / "tools" / "make_shards.py"
    command = [sys.executable, str(script), str(images), "--out", str(out), "--shard-size", str(shard_size)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def finished(out: Path) -> int:
    """The number of finished shards."""
    return len(list(out.glob("conversion/*.npz")))


def kill_at(process: subprocess.Popen[bytes], out: Path, shards: int, wait: float) -> bool:
    """Kill the conversion `wait` seconds after `shards` shards are finished. Returns False if it ended before."""
    while finished(out) < shards and process.poll() is None:
        time.sleep(0.005)
    deadline = time.monotonic() + wait
    while time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.002)
    if process.poll() is not None:
        return False
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return True


def check(out: Path, expected: dict[str, str]) -> None:
    """Raise UserError if a reader of `out` could see anything but finished files."""
    for name, digest in digests(out).items():
        if expected.get(name) != digest:
            raise UserError(f"{out / name}: visible after a kill, but different from the uninterrupted run's")


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("images", type=Path, metavar="IMAGES", help="source of images for make_shards.py")
    parser.add_argument("--results", type=Path, default=RESULTS / "kills.csv")
    parser.add_argument("--kills", type=positive, default=100, help="number of kills (default: 100)")
    parser.add_argument("--shard-size", type=positive, default=1, help="images in a shard (default: 1)")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(prefix="cropfeed-") as name:
        expected_in, out = Path(name) / "expected", Path(name) / "out"
        if start(args.images, expected_in, args.shard_size).wait():
            raise UserError(f"{args.images}: cannot be converted", "run make_shards.py on it to see why")
        expected = digests(expected_in)
        shards = sum(name.endswith(".tar") for name in expected)
        gains: list[int] = []  # shards finished before each kill
        bar = tqdm(total=args.kills, unit=" kills")
        while len(gains) < args.kills:
            left, kills_left = shards - finished(out), args.kills - len(gains)
            further = min(int(rng.uniform(0, 2 * left / kills_left)), left)
            process = start(args.images, out, args.shard_size)
            if not kill_at(process, out, shards - left + further, float(rng.uniform(0, WORKING if further else STARTING))):
                break
            check(out, expected)
            gains.append(max(finished(out) - (shards - left), 0))
            bar.update()
        bar.close()
        if start(args.images, out, args.shard_size).wait() or digests(out) != expected:
            raise UserError("the conversion after the kills differs from the uninterrupted one")
    spec = f"{args.images.name}, {shards} shards of {args.shard_size}, {os.cpu_count()} workers"
    survived = {"SIGKILLs survived, all files equal": len(gains), "of these, after further shards": sum(map(bool, gains))}
    for benchmark, kills in survived.items():
        record(args.results, benchmark, Figure("kills", [kills]), engine="local", spec=spec)


if __name__ == "__main__":
    run_cli(main)
