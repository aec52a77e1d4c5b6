"""`make_shards` converts labelled images into a data set, or resumes an earlier conversion. Also its options."""

from __future__ import annotations

import json
import logging
import os
import random
import tarfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm.utils import CallbackIOWrapper

from ..cores import usable_cores
from ..errors import StorageError, UserError
from ..progress import BYTES, progress_bar
from ..store import files
from ..store.shards import ShardSet
from . import conversion, parquet, run, sources
from .beton import BetonSettings, write_beton
from .conversion import Settings
from .images import PROFILES
from .kinds import list_sources
from .names import find_names
from .report import summary
from .sources import PACKED, Listing, SourceOptions
from .task import RECORDS, ShardTask

log = logging.getLogger("cropfeed")

FORMATS = ("webdataset", "ffcv", "both")
ENGINES = ("local", "ray")


@dataclass(frozen=True)
class ConvertOptions:
    """What to convert, and how.

    - src, out: folders or URLs.
    - profile: how images are stored: "lossless", "compact" or "original", see `images`.
    - format: "webdataset" (tars), "ffcv" (one .beton file per split) or "both".
    - shard_size: images in a shard.
    - seed: of the order of the training images.
    - strict: stop at an unusable image instead of leaving it out.
    - images: how to read the source.
    - beton: how FFCV files store images.
    - workers: processes.
    - engine: "local" or "ray".
    - ray_address: of the Ray cluster.
    - shards: make only these, numbered over all splits.
    - reencode: with the profile "lossless", store other images than JPEGs as JPEGs of quality 95, which are decoded at the crop.

    Raises UserError for values outside their ranges.
    """

    src: str
    out: str
    profile: str = "lossless"
    format: str = "webdataset"
    shard_size: int = 1000
    seed: int = 0
    strict: bool = False
    images: SourceOptions = field(default_factory=SourceOptions)
    beton: BetonSettings = field(default_factory=BetonSettings)
    workers: int = field(default_factory=usable_cores)
    engine: str = "local"
    ray_address: str = "auto"
    shards: range | None = None
    reencode: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("profile", PROFILES), ("format", FORMATS), ("engine", ENGINES)):
            if getattr(self, name) not in choices:
                raise UserError(f"`{name}` is {' or '.join(choices)}, not {getattr(self, name)!r}")
        if min(self.shard_size, self.workers) < 1:
            raise UserError("`shard_size` and `workers` must be at least 1")
        if not 0 <= self.seed < 1 << 64:
            raise UserError(f"`seed` must lie in [0, 2^64), not {self.seed}")

    @property
    def settings(self) -> Settings:
        return Settings(self.profile, self.shard_size, self.seed, self.reencode and self.profile != "compact")


def check_places(src: str, out: str) -> None:
    """Raise UserError if one of the folders is inside the other: shards would be taken for images, or mixed with them."""
    real = [path if files.is_remote(path) else os.path.realpath(path) for path in (src, out)]
    src_inside, out_inside = (f"{a}/".startswith(f"{b.rstrip('/')}/") for a, b in (real, real[::-1]))
    if src_inside and out_inside:
        raise UserError(f"{out}: is the folder of the images", "give another `out` for the shards")
    if out_inside:
        raise UserError(f"{out}: is inside the folder of the images, {src}", "give an `out` outside it")
    if src_inside:
        raise UserError(f"{src}: is inside the folder for the shards, {out}", "give another `out`")


def unused(src: str, listing: Listing) -> list[str]:
    """The folders and tars in SRC that hold no image of the listing."""
    used = {source.name.partition("/")[0] for split in listing.splits.values() for source in split}
    others = (entry for entry in sources.entries(listing.root or src) if entry.name not in used)
    return [entry.name for entry in others if entry.is_folder or entry.name.lower().endswith(PACKED)]


def make_shards(options: ConvertOptions, tell: Callable[[str], None] = log.info, sample: int | None = None) -> list[str]:
    """Convert `options.src` into `options.out`, or resume an earlier run that was stopped.

    Returns lines to print: what was made, and what was found in the images. tell: is called with a line about the source before
    the conversion begins. sample: convert only so many training images, evenly spread. Raises UserError.
    """
    src, out = files.absolute(options.src), files.absolute(options.out)
    if not options.images.list:  # a list says what the images are
        check_places(src, out)
    kind, listing = list_sources(src, options.images, options.seed)
    counts = ", ".join(f"{split} {len(found)}" for split, found in listing.splits.items())
    tell(f"{options.src}: source {kind}, {len(listing.classes)} classes, images: {counts}")
    if others := unused(src, listing):
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        listing.notes.append(f"not used: {', '.join(others[:5])}{more}")
    if sample:
        split, every = next(iter(listing.splits.items()))
        few = min(sample, len(every))
        listing = replace(listing, splits={split: [every[i * len(every) // few] for i in range(few)]}, notes=[])
    listing = replace(listing, names=listing.names or find_names(src, listing.classes))
    tasks = conversion.plan_tasks(listing, out, options.settings, options.strict)
    conversion.begin(out, conversion.fingerprint(listing, options.settings))
    for note in listing.notes:
        log.warning("%s: %s", options.src, note)
    if conversion.is_complete(out):
        lines = [_repair(options, out, tasks)]
    else:
        lines = _convert(options, out, listing, tasks)
        if not conversion.is_complete(out):
            return lines
    if options.format != "webdataset":
        write_betons(out, options.beton, options.workers)
    if options.format == "ffcv":
        remove_tars(out)
    return lines


def _convert(options: ConvertOptions, out: str, listing: Listing, tasks: dict[str, list[ShardTask]]) -> list[str]:
    """Make the chosen shards, and complete the data set if none is missing."""
    every = [task for split in tasks.values() for task in split]
    chosen = every if options.shards is None else every[options.shards.start : options.shards.stop]
    if not chosen:
        assert options.shards is not None
        wanted = f"{options.shards.start}-{options.shards.stop - 1}"
        raise UserError(f"`shards` {wanted}: there are only shards 0-{len(every) - 1}")
    started = time.perf_counter()
    missing = 0
    try:
        _run_tasks(options, chosen)
        missing = conversion.complete(out, listing, options.settings, tasks, alone=options.shards is None)
    except StorageError:
        if not conversion.is_complete(out):  # another process of the same command has finished, and has removed partial files
            raise
    seconds = time.perf_counter() - started
    images = sum(len(task.sources) for task in chosen)
    lines = [f"{out}: {len(chosen)} shards, {images} images in {seconds:.1f} s, {images / seconds:.0f} images/s"]
    if missing:
        return [*lines, f"{missing} shards are still to be made; the job that makes the last one completes the data set"]
    return lines + summary(json.loads(files.read(files.join(out, "report.json"))))


def _repair(options: ConvertOptions, out: str, tasks: dict[str, list[ShardTask]]) -> str:
    """Verify the shards of a complete data set, and make damaged ones again."""
    damaged = conversion.damaged(out, tasks)
    if damaged:
        _run_tasks(options, damaged)
    # The records of these shards, or of a run that was killed while it removed them.
    conversion.remove_records(out, alone=options.shards is None)
    if damaged:
        damaged_still = conversion.damaged(out, {"": damaged})
        if damaged_still:
            raise UserError(f"{damaged_still[0].tar}: its source images have changed", "convert them into another `out`")
    return f"{out}: complete already; {len(damaged)} damaged shards made again"


def _run_tasks(options: ConvertOptions, tasks: list[ShardTask]) -> None:
    groups = {source.rows for task in tasks for source in task.sources if source.rows}
    if groups and not all(files.exists(task.record) for task in tasks):
        parquet.unpack(files.join(tasks[0].out, RECORDS), groups, options.workers, random.random() if options.shards else 0)
    if options.engine == "ray":
        run.run_ray(tasks, options.ray_address)
    else:
        run.run_local(tasks, options.workers)


def write_betons(out: str, settings: BetonSettings, workers: int) -> None:
    """Write a .beton file for each split that has no intact one with these settings, and add it to the manifest."""
    manifest_path = files.join(out, "manifest.json")
    manifest: dict[str, Any] = json.loads(files.read(manifest_path))
    for split, entry in manifest["splits"].items():
        file = f"{split}.beton"
        path = files.join(out, file)
        known = entry.get("beton", {})
        written = known.get("settings") == asdict(settings) and files.exists(path)
        if written and files.sha256(path, f"verifying {file}") == known["sha256"]:
            continue
        shards = ShardSet(out, split)
        # FFCV writes local files; if OUT is remote, the file is then uploaded.
        place = files.atomic_write(path, f"uploading {file}") if files.is_remote(path) else nullcontext(Path(path))
        with progress_bar(total=len(shards), unit=" images", desc=f"writing {file}") as bar, place as local:
            digest = write_beton(shards, local, settings, workers, bar.update)
        entry["beton"] = {"file": file, "sha256": digest, "settings": asdict(settings)}
        files.write(manifest_path, json.dumps(manifest, indent=1).encode())


def remove_tars(out: str) -> None:
    """Remove the tars of a data set, so that only FFCV files are left."""
    path = files.join(out, "manifest.json")
    manifest: dict[str, Any] = json.loads(files.read(path))
    for entry in manifest["splits"].values():
        entry.pop("fields", None)
        entry["shards"] = []  # first, so that no reader looks for tars that are being removed
    files.write(path, json.dumps(manifest, indent=1).encode())
    for split in manifest["splits"]:
        folder = files.join(out, split)
        for found in progress_bar(files.list_folder(folder), unit=" files", desc=f"removing the tars of {split}"):
            if found.name.endswith((".tar", ".idx")):
                files.remove(files.join(folder, found.name))


EXPECTED = "give a folder of class folders of JPEGs, or a tar of one"


def find_images(images: Path, folder: Path) -> tuple[int, Path]:
    """The number of images, and the folder of class folders that contains them. A tar is unpacked into `folder`."""
    source = images
    if images.is_file():
        source = folder / "unpacked"
        try:
            bar = progress_bar(total=images.stat().st_size, desc=f"unpacking {images.name}", **BYTES)
            with bar, images.open("rb") as stream, tarfile.open(fileobj=CallbackIOWrapper(bar.update, stream)) as tar:
                tar.extractall(source, filter="data")
        except (OSError, tarfile.TarError) as error:
            raise UserError(f"{images}: cannot be unpacked ({error})", EXPECTED) from error
        while len(inside := list(source.iterdir())) == 1 and any(path.is_dir() for path in inside[0].iterdir()):
            source = inside[0]
    folders = progress_bar(list(source.glob("*/")), unit=" classes", desc=f"listing {source}")
    found = sum(path.suffix.lower() in (".jpeg", ".jpg") for folder in folders for path in folder.glob("*"))
    if not found:
        raise UserError(f"{images}: holds no <class>/*.JPEG", EXPECTED)
    return found, source
