"""The converter against FFCV's and WebDataset's writers: python tools/bench/bench_convert.py IMAGES

IMAGES is a folder of JPEGs, searched with all its subfolders, or a tar of one. The benchmark runs on one core, on the same files
in a warm page cache, and the writers take turns:

- Cropfeed's shard task with each profile. It computes the statistics over the share of images that it uses on ImageNet, 100,000
  of 1,281,167, and once over all images;
- FFCV's own DatasetWriter (jpg, longest side 500, quality 90, one worker), without the time that its worker takes to start;
- a plain webdataset.ShardWriter, which copies bytes without decoding;
- Cropfeed's shard task with progressive JPEGs: IMAGES as they are, mirrored, and turned by 90 degrees, re-coded by jpegtran.
  Before, each of them must give the bytes that the same image gives as a baseline JPEG, so the same coefficients.

Then it measures the peak memory of make_shards.py with one worker, for IMAGES repeated to 1,000 and 4,000 files. Rows go to
tools/bench/results/convert.csv.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import _path  # noqa: F401
from PIL import Image
from tqdm import tqdm

from pipeline.cli import Parser, positive, run_cli
from pipeline.convert import statistics
from pipeline.convert.images import PROFILES
from pipeline.convert.sources import Source
from pipeline.convert.task import ShardTask, read_record, run
from pipeline.errors import UserError
from pipeline.jpeg.transcode import transcode
from tools import ROOT
from tools.bench.recording import RESULTS, Figure, ratios, record

IMAGENET = 1_281_167  # training images
FFCV = "ffcv DatasetWriter, jpg, 500 px, q90"
PROGRESSIVE = "cropfeed lossless, progressive JPEGs"
VARIANTS = ((), ("-flip", "horizontal", "-trim"), ("-rotate", "90", "-trim"))  # jpegtran's options; none changes a coefficient


class Images:
    """The data set for FFCV's writer, with samples like those of ffcv-imagenet's ImageFolder."""

    def __init__(self, files: list[str]) -> None:
        self.files = files
        self.began = multiprocessing.Value("d", 0.0)  # time of the first access, in the writer's worker

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        self.began.value = self.began.value or time.perf_counter()
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
    images = Images(files)
    DatasetWriter(str(out / "x.beton"), fields, num_workers=1).from_indexed_dataset(images)
    answer.send(time.perf_counter() - images.began.value)


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


def recode(files: list[str], out: Path) -> list[str]:
    """Write all VARIANTS of the files as progressive JPEGs; returns their paths. Raises UserError if the converter finds other
    coefficients in one than in its baseline form."""
    if not shutil.which("jpegtran"):
        raise UserError("jpegtran is not installed", "apt-get install libjpeg-turbo-progs")
    out.mkdir()
    found = []
    for number, file in enumerate(tqdm(files, unit=" images", desc="re-coding")):
        for variant, options in enumerate(VARIANTS):
            command = ["jpegtran", "-copy", "none", *options]
            baseline, progressive = (
                subprocess.run([*command, *kind, file], stdout=subprocess.PIPE, check=True).stdout
                for kind in ((), ("-progressive",))
            )
            if b"\xff\xc2" not in progressive or transcode(progressive) != transcode(baseline):
                raise UserError(f"{file}: its coefficients change when it is re-coded as a progressive JPEG")
            found.append(out / f"{number:06d}-{variant}.jpg")
            found[-1].write_bytes(progressive)
    return [str(path) for path in found]


def peak_memory(files: list[str], count: int, folder: Path) -> float:
    """The peak memory of converting `count` images with make_shards.py in one process, MB. The files are repeated."""
    shutil.rmtree(folder, ignore_errors=True)
    for number in range(count):
        path = folder / "images" / "train" / str(number % 2) / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(Path(files[number % len(files)]).resolve())
    command = [sys.executable, str(ROOT / "tools/make_shards.py"), str(folder / "images"), "--out", str(folder / "shards")]
    process = subprocess.Popen([*command, "--workers", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"make_shards.py failed with exit code {process.returncode}")
    return usage.ru_maxrss / 1e3


def images_in(source: Path, out: Path) -> list[str]:
    """The JPEGs in a folder, or in a tar, which is unpacked to `out`."""
    if source.is_file():
        with tarfile.open(source) as tar:
            tar.extractall(out, filter="data")
        source = out
    files = sorted(str(path) for path in source.rglob("*") if path.suffix.lower() in (".jpeg", ".jpg"))
    if not files:
        raise UserError(f"{source}: holds no JPEGs")
    return files


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("images", type=Path, metavar="IMAGES", help="folder or tar of JPEGs")
    parser.add_argument("--results", type=Path, default=RESULTS / "convert.csv")
    parser.add_argument("--repeats", type=positive, default=5, help="measurements of each writer (default: %(default)s)")
    parser.add_argument(
        "--memory", type=positive, nargs="*", default=[1000, 4000], metavar="N",
        help="numbers of images of which the peak memory is measured (default: 1000 4000)",
    )  # fmt: skip
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cropfeed-") as folder:
        out = Path(folder)
        files = images_in(args.images, out / "images")
        name = f"{args.images.name.removesuffix('.tar')}, {{}} images, one core"
        progressive = recode(files, out / "progressive")
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        writers = contenders(files, progressive, out)
        times: dict[str, list[float]] = {writer: [] for writer in writers}
        for repeat in tqdm(range(args.repeats + 1), unit=" repeats"):
            for writer, write in writers.items():
                took = write()
                if repeat:  # the first repeat compiles and warms up
                    times[writer].append(took)
        counts = {writer: len(progressive if writer == PROGRESSIVE else files) for writer in writers}
        report(args.results, name, counts, writers, times)
        for count in args.memory:
            figure = Figure("peak_memory_mb", [peak_memory(files, count, out / "memory") for _ in range(min(args.repeats, 3))])
            record(args.results, "convert", figure, engine="make_shards.py", spec=name.format(count))


def contenders(files: list[str], progressive: list[str], out: Path) -> dict[str, Callable[[], float]]:
    """Name -> a function that converts all images and returns the seconds that it took."""
    share = statistics.IMAGES / IMAGENET
    return {
        **{f"cropfeed {profile}": ShardTasks(files, out / profile, profile, round(len(files) * share)) for profile in PROFILES},
        "cropfeed lossless, all in the statistics": ShardTasks(files, out / "all", "lossless", len(files)),
        PROGRESSIVE: ShardTasks(progressive, out / "shards", "lossless", round(len(progressive) * share)),
        FFCV: ffcv(files, out),
        "webdataset ShardWriter, bytes as they are": shard_writer(files, out),
    }


def report(
    file: Path, spec: str, counts: dict[str, int], writers: dict[str, Callable[[], float]], times: dict[str, list[float]]
) -> None:
    """Record images/s of each writer and, for Cropfeed, the stored bytes and the speedup over FFCV with the same images.

    spec: with a place for the number of images. counts: those numbers.
    """
    for name, writer in writers.items():
        figures = [Figure("images_per_s", [counts[name] / seconds for seconds in times[name]])]
        if isinstance(writer, ShardTasks):
            figures.append(Figure("bytes_ratio", [writer.bytes_ratio]))
            if name != PROGRESSIVE:
                figures.append(Figure("times_ffcv_writer", ratios(times[FFCV], times[name])))
        record(file, "convert", *figures, engine=name, spec=spec.format(counts[name]))


if __name__ == "__main__":
    run_cli(main)
