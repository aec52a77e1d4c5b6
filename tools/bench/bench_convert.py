"""The converter against FFCV's and WebDataset's writers: python tools/bench/bench_convert.py IMAGES

IMAGES is a folder of JPEGs, searched with all its subfolders. The benchmark runs on one core, on the same files in a warm page
cache, and the writers take turns:

- Cropfeed's shard task with each profile. It computes the statistics over the share of images that it uses on ImageNet, 100,000
  of 1,281,167, and once over all images;
- FFCV's own DatasetWriter (jpg, longest side 500, quality 90, one worker);
- a plain webdataset.ShardWriter, which copies bytes without decoding.

Rows go to tools/bench/results/convert.csv.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import _path  # noqa: F401
from PIL import Image
from tqdm import tqdm

from pipeline.cli import Parser, run_cli
from pipeline.convert import statistics
from pipeline.convert.images import PROFILES
from pipeline.convert.sources import Source
from pipeline.convert.task import ShardTask, read_record, run
from pipeline.errors import UserError
from tools.bench.recording import RESULTS, Figure, record

REPEATS = 5
IMAGENET = 1_281_167  # training images
FFCV = "ffcv DatasetWriter, jpg, 500 px, q90"


class Images:
    """The data set for FFCV's writer, with samples like those of ffcv-imagenet's ImageFolder."""

    def __init__(self, files: list[str]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.open(self.files[index]).convert("RGB"), 0


class ShardTasks:
    """Cropfeed's shard task. counted: number of images in the statistics."""

    def __init__(self, files: list[str], out: Path, profile: str, counted: int) -> None:
        self._sources = [Source(file, 0, None, f"{i:06d}", 0, file, 0) for i, file in enumerate(files)]
        self._out, self._profile, self._counted = out, profile, counted
        self._runs = 0
        self.bytes_ratio = 0.0  # stored bytes over the bytes of the source, in the last run

    def __call__(self) -> float:
        """Make a new shard; returns the seconds that it took."""
        task = ShardTask(str(self._out), "train", self._runs, self._sources, self._profile, 4, False, self._counted)
        self._runs += 1
        began = time.perf_counter()
        run(task, lambda: None)
        took = time.perf_counter() - began
        found = read_record(task)
        assert found is not None
        self.bytes_ratio = found.stored_bytes / found.read_bytes
        return took


def _write_beton(files: list[str], out: Path, answer: Connection) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    fields = {"image": RGBImageField(write_mode="jpg", max_resolution=500, jpeg_quality=90), "label": IntField()}
    began = time.perf_counter()
    DatasetWriter(str(out / "x.beton"), fields, num_workers=1).from_indexed_dataset(Images(files))
    answer.send(time.perf_counter() - began)


def ffcv(files: list[str], out: Path) -> Callable[[], float]:
    """A function that measures the seconds of FFCV's writer. The writer gets its own process, which is killed afterwards because
    it may hang at exit."""

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
    parser.add_argument("--results", type=Path, default=RESULTS / "convert.csv")
    args = parser.parse_args()
    files = sorted(str(path) for path in args.images.rglob("*") if path.suffix.lower() in (".jpeg", ".jpg"))
    if not files:
        raise UserError(f"{args.images}: holds no JPEGs")
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    share = round(len(files) * statistics.IMAGES / IMAGENET)
    with tempfile.TemporaryDirectory(prefix="cropfeed-") as folder:
        out = Path(folder)
        writers: dict[str, Callable[[], float]] = {
            **{f"cropfeed {profile}": ShardTasks(files, out / profile, profile, share) for profile in PROFILES},
            "cropfeed lossless, all in the statistics": ShardTasks(files, out / "all", "lossless", len(files)),
            FFCV: ffcv(files, out),
            "webdataset ShardWriter, bytes as they are": shard_writer(files, out),
        }
        times: dict[str, list[float]] = {name: [] for name in writers}
        for repeat in tqdm(range(REPEATS + 1), unit=" repeats"):
            for name, write in writers.items():
                took = write()
                if repeat:  # the first repeat compiles and warms up
                    times[name].append(took)
    report(args.results, f"{args.images.name}, {len(files)} images, one core", len(files), writers, times)


def report(file: Path, spec: str, count: int, writers: dict[str, Callable[[], float]], times: dict[str, list[float]]) -> None:
    """Record images/s of each writer and, for Cropfeed, the stored bytes and the speedup over FFCV. count: number of images."""
    for name, seconds in times.items():
        figures = [Figure("images_per_s", [count / s for s in seconds])]
        writer = writers[name]
        if isinstance(writer, ShardTasks):
            speedups = [ffcv_seconds / s for s, ffcv_seconds in zip(seconds, times[FFCV], strict=True)]
            figures += [Figure("bytes_ratio", [writer.bytes_ratio]), Figure("times_ffcv_writer", speedups)]
        record(file, "convert", *figures, engine=name, spec=spec, cache="warm")


if __name__ == "__main__":
    run_cli(main)
