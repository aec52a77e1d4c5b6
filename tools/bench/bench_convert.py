"""The converter against FFCV's and WebDataset's writers: python tools/bench/bench_convert.py IMAGES

IMAGES is a folder of JPEGs, searched whole. On one core, in one run, in alternating repeats, on the same files from a warm page
cache: our shard task with each profile (statistics over 100,000 of ImageNet's 1,281,167 training images, so over that share of
these; and once over all of them), FFCV's own DatasetWriter (jpg, longest side 500, quality 90, one worker), and a plain
webdataset.ShardWriter, which copies bytes and decodes nothing. Rows go to tools/bench/results/convert.csv.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import _path  # noqa: F401
from PIL import Image
from tqdm import tqdm

from pipeline.cli import Parser, run_cli
from pipeline.convert import statistics
from pipeline.convert.images import PROFILES
from pipeline.convert.sources import Source
from pipeline.convert.task import ShardTask, read_record, run
from pipeline.errors import UserError
from tools import ROOT
from tools.bench.recording import Figure, record

REPEATS = 5
IMAGENET = 1_281_167  # training images


class Images:
    """What FFCV's writer is handed: as ffcv-imagenet's ImageFolder gives it."""

    def __init__(self, files: list[str]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.open(self.files[index]).convert("RGB"), 0


def ours(files: list[str], out: Path, profile: str, counted: int) -> Callable[[], float]:
    """Seconds of one shard task; afterwards `out` holds its record."""
    sources = [Source(file, 0, None, f"{i:06d}", 0, file, 0) for i, file in enumerate(files)]
    number = iter(range(1_000_000))

    def seconds() -> float:
        task = ShardTask(str(out), "train", next(number), sources, profile, 4, False, counted)
        began = time.perf_counter()
        run(task, lambda: None)
        took = time.perf_counter() - began
        found = read_record(task)
        assert found is not None
        seconds.ratio = found.stored_bytes / found.read_bytes  # type: ignore[attr-defined]
        return took

    return seconds


def _write_beton(files: list[str], out: Path, answer: Connection) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    fields = {"image": RGBImageField(write_mode="jpg", max_resolution=500, jpeg_quality=90), "label": IntField()}
    began = time.perf_counter()
    DatasetWriter(str(out / "x.beton"), fields, num_workers=1).from_indexed_dataset(Images(files))
    answer.send(time.perf_counter() - began)


def ffcv(files: list[str], out: Path) -> Callable[[], float]:
    """In a process of its own that is killed afterwards: FFCV's writer may hang when its process ends."""

    def seconds() -> float:
        receiver, sender = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.Process(target=_write_beton, args=(files, out, sender))
        process.start()
        try:
            if not receiver.poll(600):
                raise UserError("FFCV's writer did not answer within ten minutes")
            return float(receiver.recv())
        finally:
            process.kill()
            process.join()

    return seconds


def shard_writer(files: list[str], out: Path) -> Callable[[], float]:
    import webdataset

    def seconds() -> float:
        began = time.perf_counter()
        with webdataset.ShardWriter(str(out / "x-%06d.tar"), maxcount=1000, verbose=0) as writer:
            for i, file in enumerate(files):
                writer.write({"__key__": f"{i:06d}", "jpg": Path(file).read_bytes(), "cls": 0})
        return time.perf_counter() - began

    return seconds


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("images", type=Path, metavar="IMAGES", help="folder of JPEGs")
    parser.add_argument("--results", type=Path, default=ROOT / "tools" / "bench" / "results" / "convert.csv")
    args = parser.parse_args()
    files = sorted(str(path) for path in args.images.rglob("*") if path.suffix.lower() in (".jpeg", ".jpg"))
    if not files:
        raise UserError(f"{args.images}: holds no JPEGs")
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    share = round(len(files) * statistics.IMAGES / IMAGENET)
    with tempfile.TemporaryDirectory(prefix="cropfeed-") as name:
        out = Path(name)
        rivals: dict[str, Callable[[], float]] = {
            **{f"cropfeed {profile}": ours(files, out / profile, profile, share) for profile in PROFILES},
            "cropfeed lossless, all in the statistics": ours(files, out / "all", "lossless", len(files)),
            "ffcv DatasetWriter, jpg, 500 px, q90": ffcv(files, out),
            "webdataset ShardWriter, bytes as they are": shard_writer(files, out),
        }
        times: dict[str, list[float]] = {rival: [] for rival in rivals}
        for repeat in tqdm(range(REPEATS + 1), unit=" repeats"):
            for rival, seconds in rivals.items():
                took = seconds()
                if repeat:  # the first compiles and warms up
                    times[rival].append(took)
    report(args.results, args.images.name, len(files), rivals, times)


def report(file: Path, name: str, count: int, rivals: dict[str, Any], times: dict[str, list[float]]) -> None:
    spec = f"{name}, {count} images, one core"
    theirs = times["ffcv DatasetWriter, jpg, 500 px, q90"]
    for rival, seconds in times.items():
        record(file, "convert", Figure("images_per_s", [count / s for s in seconds]), engine=rival, spec=spec, cache="warm")
        if hasattr(rivals[rival], "ratio"):
            record(file, "convert", Figure("bytes_ratio", [rivals[rival].ratio]), engine=rival, spec=spec, cache="warm")
            against = Figure("times_ffcv_writer", [b / a for a, b in zip(seconds, theirs, strict=True)])
            record(file, "convert", against, engine=rival, spec=spec, cache="warm")


if __name__ == "__main__":
    run_cli(main)
