"""Checks of the data set: whether it is complete, and fits into memory and its disk or cache. Needs Cropfeed's packages."""

from __future__ import annotations

import os
from pathlib import Path

from ..cli import with_flags
from ..errors import UserError
from ..store import files
from ..store.cache import FREE_SHARE, choose_cache
from ..store.entries import Entries, column
from ..store.manifest import Manifest
from .lines import DoctorOptions, Line
from .machine import GB, available_memory, free_disk


def check(options: DoctorOptions, data: str) -> list[Line]:
    """data: `options.data`."""
    try:
        manifest = Manifest(data)
        splits = image_files(manifest)
    except UserError as error:
        return [failed("data", error)]
    remote, count = files.is_remote(manifest.root), sum(map(len, splits))
    if not remote and (wrong := damaged_files(manifest, splits)):
        found = f"missing or of the wrong size: {len(wrong)} of {count + len(splits)} files, first {wrong[0]}"
        return [Line("failed", "data", found, "repeat the command that made these shards: it replaces damaged ones")]
    images = sum(split["images"] for split in manifest.splits.values())
    total = sum(int(column(entries, "bytes").sum()) for entries in splits)
    found = f"{images:,} images in {count:,} files of {total / GB:.3g} GB, profile {manifest.profile}"
    cached = remote or options.cache is not None or options.cache_gb is not None  # as in ShardSet
    disk = check_cache(options, manifest.root, splits, total) if cached else check_data_disk(manifest.root)
    return [Line("ok", "data", found), check_page_cache(options, total, manifest.profile), disk]


def failed(name: str, error: UserError) -> Line:
    """A line for a UserError. Field names in its message become flags of this command."""
    found, remedy = (with_flags(text) for text in (error.problem, error.remedy))
    if not remedy and isinstance(error.__cause__, ImportError):
        remedy = "install the package that it names"
    return Line("failed", name, found, remedy or "check the address, the credentials and the network")


def image_files(manifest: Manifest) -> list[Entries]:
    """The files with the images of each split, as entries with `file` and `bytes`."""

    def of_beton(file: str) -> Entries:
        return [{"file": file, "bytes": files.size(files.join(manifest.root, file))}]

    return [split["shards"] or of_beton(split["beton"]["file"]) for split in manifest.splits.values()]


def damaged_files(manifest: Manifest, splits: list[Entries]) -> list[str]:
    wanted = ((files.join(manifest.root, entry["file"]), entry["bytes"]) for entries in splits for entry in entries)
    wrong = [path for path, size in wanted if not os.path.isfile(path) or os.path.getsize(path) != size]
    samples = [files.join(manifest.root, split["samples"]) for split in manifest.splits.values()]
    return wrong + [path for path in samples if not os.path.isfile(path)]


def check_page_cache(options: DoctorOptions, total: int, profile: str) -> Line:
    free = available_memory(options.root)
    found = f"{total / GB:.3g} GB of data, {free / GB:.3g} GB of memory"
    if total <= free:
        return Line("ok", "page cache", found)
    smaller = "" if profile == "compact" else "; or shards of profile compact, with half the bytes"
    return Line("warning", "page cache", f"{found}: every epoch reads the disk", f"--order blocks{smaller}")


def check_data_disk(root: str) -> Line:
    place, free = free_disk(Path(root))
    found = f"{free / GB:.3g} GB free on the disk of {root}"
    if free < GB and os.access(place, os.W_OK):  # a full read-only disk is fine
        remedy = f"free some space: new versions of shards are written beside the old ones; du -sh {root}"
        return Line("warning", "data disk", found, remedy)
    return Line("ok", "data disk", found)


def check_cache(options: DoctorOptions, root: str, splits: list[Entries], total: int) -> Line:
    """Whether the data fits the cache's limit, and the limit fits the disk."""
    try:
        cache = choose_cache(options.cache, options.cache_gb)
        for entries in splits:
            largest = entries[int(column(entries, "bytes").argmax())]
            cache.check(files.join(root, largest["file"]), largest["bytes"])
    except UserError as error:
        return failed("cache", error)
    place, free = free_disk(cache.folder)
    if not os.access(place, os.W_OK):
        return Line("failed", "cache", f"{place} cannot be written", "give another --cache (CROPFEED_CACHE)")
    free += sum(path.stat().st_size for path in cache.folder.glob("*"))  # the cache may replace its files
    found = f"{cache.folder}: limit {cache.limit / GB:.3g} GB, free {free / GB:.3g} GB, data {total / GB:.3g} GB"
    if min(total, cache.limit) > free:
        return Line("failed", "cache", found, f"--cache-gb {FREE_SHARE * free / GB:.3g}, or --cache FOLDER on a larger disk")
    if total > cache.limit:
        remedy = "raise --cache-gb (CROPFEED_CACHE_GB), or --order blocks: in a random order, each image is requested by itself"
        return Line("warning", "cache", found, remedy)
    return Line("ok", "cache", found)
