"""Turn a folder of images into shards: python tools/make_shards.py /imagenet --out /data/shards

SRC is an ImageFolder: SRC/train/<class>/*.JPEG and SRC/val/<class>/*.JPEG, or class folders directly (then there is only a
training split). Labels are the class folders' places in sorted order. Every image is decoded in full once; a file that is no
image stops the run. OUT appears whole or not at all. The same source gives the same bytes for any number of workers.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import re
import shutil
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import _path  # noqa: F401
import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm
from workers import end_with_parent

from pipeline import augment, plan, shards
from pipeline.errors import Parser, UserError, positive, run_cli

# What every engine decodes; MPO is what Pillow calls a JPEG with more pictures behind it, of which the first counts.
FORMATS = ("JPEG", "MPO", "PNG", "BMP", "WEBP")
MEAN_SHORT, MEAN_SIZE = 256, 224  # the evaluation transform, on which the statistics are taken


@dataclass(frozen=True)
class Source:
    """One image file. key: its name in the shard, unique in its split."""

    path: Path
    key: str
    label: int


@dataclass
class Statistics:
    """Exact integer sums over centre crops, so that their total does not depend on the order of adding.

    images: how many. image: int64 (224, 224, 3), the sum of crops. products: int64 (3, 3), the sum over pixels of rgb rgb^T.
    """

    images: int
    image: npt.NDArray[np.int64]
    products: npt.NDArray[np.int64]

    @staticmethod
    def none() -> Statistics:
        return Statistics(0, np.zeros((MEAN_SIZE, MEAN_SIZE, 3), np.int64), np.zeros((3, 3), np.int64))

    def add_crop(self, crop: npt.NDArray[np.uint8]) -> None:
        self.images += 1
        self.image += crop
        pixels = crop.reshape(-1, 3).astype(np.float64)  # products stay far below 2^53: exact
        self.products += (pixels.T @ pixels).astype(np.int64)

    def add(self, other: Statistics) -> None:
        self.images += other.images
        self.image += other.image
        self.products += other.products

    def mean_image(self) -> npt.NDArray[np.float32]:
        return (self.image / self.images).astype(np.float32)

    def summary(self) -> dict[str, Any]:
        """The manifest's `statistics`, without the mean image."""
        pixels = self.images * MEAN_SIZE * MEAN_SIZE
        mean = self.image.sum(axis=(0, 1)) / pixels
        covariance = (self.products / pixels - np.outer(mean, mean)) / 255.0**2
        values, vectors = augment.eigenbasis(covariance)
        return {
            "channel_mean": mean.tolist(),
            "rgb_covariance": covariance.tolist(),
            "eigenvalues": values.tolist(),
            "eigenvectors": vectors.tolist(),
        }


@dataclass(frozen=True)
class Task:
    """One shard to write: a pure function of its sources."""

    path: Path
    shard: int
    sources: list[Source]
    digits: int


def find_splits(src: Path) -> dict[str, Path]:
    """The folders of class folders: train and val inside SRC, or SRC itself as train."""
    if not src.is_dir():
        raise UserError(f"{src}: no such folder; give the folder that holds train/<class>/*.JPEG and val/<class>/*.JPEG")
    return {name: src / name for name in ("train", "val") if (src / name).is_dir()} or {"train": src}


def list_classes(splits: dict[str, Path]) -> list[str]:
    """Class folder names in sorted order, of the training split where there is one."""
    folder = next(iter(splits.values()))
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise UserError(f"{folder}: holds no class folders; expected {folder}/<class>/*.JPEG")
    return classes


def list_sources(folder: Path, classes: list[str]) -> list[Source]:
    """Every file of a split, by class and then name. Hidden files are passed over; an empty class is an error."""
    labels = {name: label for label, name in enumerate(classes)}
    found = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    sources: list[Source] = []
    taken: set[str] = set()
    for name in found:
        if name not in labels:
            raise UserError(f"{folder / name}: class {name} is not in the training split; remove it or add its training images")
        with os.scandir(folder / name) as entries:
            files = sorted(entry.name for entry in entries if not entry.name.startswith("."))
        if not files:
            raise UserError(f"{folder / name}: class folder without images; remove it or fill it")
        for file in files:
            # WebDataset ends a key at the file name's first dot, DALI's index splits its lines at white space.
            key = base = re.sub(r"\s", "_", name) + "/" + re.sub(r"[.\s]", "_", Path(file).stem)
            copy = 1
            while key in taken:
                key, copy = f"{base}-{copy}", copy + 1
            taken.add(key)
            sources.append(Source(folder / name / file, key, labels[name]))
    return sources


def read_image(path: Path) -> tuple[bytes, Image.Image]:
    """The file's bytes and its fully decoded image. Raises UserError for anything that is no image we can store."""
    try:
        data = path.read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of broken EXIF, which nobody reads here
            image = Image.open(io.BytesIO(data))
            image.load()
    except Exception as error:  # decoders raise a dozen kinds; each means that this file cannot be trained on
        reason = "is a folder" if path.is_dir() else f"no readable image ({str(error).split(' <')[0]})"
        raise UserError(f"{path}: {reason}; remove it or replace it") from error
    if image.format not in FORMATS:
        raise UserError(f"{path}: is a {image.format} image; convert it to JPEG")
    return data, image


_done: Synchronized[int]  # images finished by all workers, for the progress bar


def _start_worker(done: Synchronized[int]) -> None:
    global _done
    _done = done
    end_with_parent()


def write_task(task: Task) -> tuple[shards.Samples, Statistics, str]:
    """Write one shard; return its records, its statistics and its SHA-256. Runs in a worker process."""
    statistics = Statistics.none()

    def encoded() -> Iterator[shards.Encoded]:
        for source in task.sources:
            data, image = read_image(source.path)
            width, height = image.size
            draw = plan.centre([height], [width], MEAN_SHORT, MEAN_SIZE)
            statistics.add_crop(augment.resample(image, draw, MEAN_SIZE))
            with _done.get_lock():
                _done.value += 1
            yield shards.Encoded(source.key, data, source.label, height, width)

    records = shards.write_shard(task.path, task.path.with_suffix(".idx"), task.shard, encoded(), task.digits)
    return records, statistics, shards.sha256(task.path)


def run_tasks(tasks: list[Task], workers: int) -> list[tuple[shards.Samples, Statistics, str]]:
    """All tasks in processes, with a progress bar; the results in the tasks' order. The first error stops the rest."""
    context = multiprocessing.get_context("spawn")
    done: Synchronized[int] = context.Value("q", 0)
    total = sum(len(task.sources) for task in tasks)
    pool = ProcessPoolExecutor(min(workers, len(tasks)), context, _start_worker, (done,))
    bar = tqdm(total=total, unit=" images", smoothing=0.1)
    try:
        futures: list[Future[Any]] = [pool.submit(write_task, task) for task in tasks]
        pending = set(futures)
        while pending:
            finished, pending = wait(pending, timeout=0.5, return_when=FIRST_EXCEPTION)
            bar.update(done.value - bar.n)
            for future in finished:
                future.result()
        return [future.result() for future in futures]
    except BaseException:
        for process in list(pool._processes.values()):  # the pool itself would first finish the shards in progress
            process.terminate()
        raise
    finally:
        bar.close()
        pool.shutdown(cancel_futures=True)


def plan_tasks(out: Path, splits: dict[str, Path], classes: list[str], shard_size: int) -> dict[str, list[Task]]:
    """Which sample goes to which shard: the training listing in the plan's order, others as listed."""
    tasks: dict[str, list[Task]] = {}
    for name, folder in splits.items():
        sources = list_sources(folder, classes)
        if name == "train":
            sources = [sources[i] for i in plan.order(0, 0, np.arange(len(sources)), len(sources))]
        (out / name).mkdir(parents=True)
        tasks[name] = [
            Task(out / name / f"{shard:06d}.tar", shard, sources[start : start + shard_size], shards.label_digits(len(classes)))
            for shard, start in enumerate(range(0, len(sources), shard_size))
        ]
    return tasks


def convert(src: Path, out: Path, workers: int, shard_size: int) -> dict[str, Any]:
    """Write a whole data set into the empty folder `out`; return its manifest."""
    splits = find_splits(src)
    classes = list_classes(splits)
    tasks = plan_tasks(out, splits, classes, shard_size)
    results = iter(run_tasks([task for split in tasks.values() for task in split], workers))
    manifest: dict[str, Any] = {
        "format": shards.FORMAT, "version": shards.VERSION, "profile": "original",
        "classes": classes, "label_digits": shards.label_digits(len(classes)), "splits": {}, "statistics": {},
    }  # fmt: skip
    for name, split_tasks in tasks.items():
        records, entries, total = [], [], Statistics.none()
        for task in split_tasks:
            samples, statistics, digest = next(results)
            records.append(samples)
            total.add(statistics)
            file = str(task.path.relative_to(out))
            entries.append({"file": file, "images": len(samples), "bytes": task.path.stat().st_size, "sha256": digest})
        file = f"{name}/samples.npy"
        np.save(out / file, np.concatenate(records))
        manifest["splits"][name] = {
            "images": total.images, "samples": file, "samples_sha256": shards.sha256(out / file), "shards": entries,
        }  # fmt: skip
        if not manifest["statistics"]:  # of the first split: training, where there is one
            np.save(out / "mean_image.npy", total.mean_image())
            mean = {"mean_image": "mean_image.npy", "mean_image_sha256": shards.sha256(out / "mean_image.npy")}
            manifest["statistics"] = total.summary() | mean
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1))
    return manifest


def make_shards(src: Path, out: Path, workers: int, shard_size: int) -> None:
    """Convert into OUT.partial and rename it to OUT when everything is there."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already; remove it or give another --out")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    started = time.perf_counter()
    try:
        find_splits(src)  # before anything is created
        partial.mkdir(parents=True)
        manifest = convert(src, partial, workers, shard_size)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    seconds = time.perf_counter() - started
    images = sum(split["images"] for split in manifest["splits"].values())
    sizes = ", ".join(f"{split['images']} {name}" for name, split in manifest["splits"].items())
    print(f"{out}: {sizes} images of {len(manifest['classes'])} classes in {seconds:.1f} s, {images / seconds:.0f} images/s")


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("src", type=Path, metavar="SRC", help="the folder of images")
    parser.add_argument("--out", type=Path, required=True, help="the folder to make")
    parser.add_argument("--workers", type=positive, default=os.cpu_count() or 1, help="processes (default: one a core)")
    parser.add_argument("--shard-size", type=positive, default=1000, help="images in a shard (default: 1000)")
    args = parser.parse_args()
    make_shards(args.src, args.out.absolute(), args.workers, args.shard_size)


if __name__ == "__main__":
    run_cli(main)
