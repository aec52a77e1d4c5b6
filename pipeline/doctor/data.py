"""Checks of the data set: whether it is complete, and fits into memory and its disk or cache. Needs Cropfeed's packages."""

from __future__ import annotations

import os
from pathlib import Path

from ..cli import with_flags
from ..errors import UserError
from ..store import files
from ..store.cache import FREE_SHARE, ShardCache, choose_cache
from ..store.shards import Manifest
from .lines import DoctorOptions, Line
from .machine import GB, available_memory, free_disk


def check(options: DoctorOptions, data: str) -> list[Line]:
    """data: `options.data`."""
    try:
        manifest = Manifest(data)
        sizes = file_sizes(manifest)
    except UserError as error:
        return [failed("data", error)]
    remote = files.is_remote(manifest.root)
    if not remote and (wrong := damaged_files(manifest, sizes)):
        found = f"missing or of the wrong size: {len(wrong)} of {len(sizes) + len(manifest.splits)} files, first {wrong[0]}"
        return [Line("failed", "data", found, "repeat the command that made these shards: it replaces damaged ones")]
    total, images = sum(sizes.values()), sum(split["images"] for split in manifest.splits.values())
    found = f"{images:,} images in {len(sizes):,} files of {total / GB:.3g} GB, profile {manifest.profile}"
    cached = remote or options.cache is not None or options.cache_gb is not None  # as in ShardSet
    disk = check_cache(options, sizes) if cached else check_data_disk(manifest.root)
    return [Line("ok", "data", found), check_page_cache(options, total, manifest.profile), disk]


def failed(name: str, error: UserError) -> Line:
    """A line for a UserError. Field names in its message become flags of this command."""
    found, remedy = (with_flags(text) for text in (error.problem, error.remedy))
    if not remedy and isinstance(error.__cause__, ImportError):
        remedy = "install the package that it names"
    return Line("failed", name, found, remedy or "check the address, the credentials and the network")


def file_sizes(manifest: Manifest) -> dict[str, int]:
    """Path or URL -> size in bytes of the files with the images. For tars, the size is the one in the manifest."""
    sizes: dict[str, int] = {}
    for split in manifest.splits.values():
        sizes |= {files.join(manifest.root, shard["file"]): shard["bytes"] for shard in split["shards"]}
        if not split["shards"]:  # FFCV files only
            url = files.join(manifest.root, split["beton"]["file"])
            sizes[url] = files.size(url)
    return sizes


def damaged_files(manifest: Manifest, sizes: dict[str, int]) -> list[str]:
    wrong = [path for path, size in sizes.items() if not os.path.isfile(path) or os.path.getsize(path) != size]
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


def check_cache(options: DoctorOptions, sizes: dict[str, int]) -> Line:
    try:
        cache = choose_cache(options.cache, options.cache_gb)
        for url, size in sizes.items():
            cache.check(url, size)
    except UserError as error:
        return failed("cache", error)
    return check_cache_size(cache, sum(sizes.values()))


def check_cache_size(cache: ShardCache, total: int) -> Line:
    """Whether the data fits the cache's limit, and the limit fits the disk."""
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
