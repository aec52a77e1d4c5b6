"""The data set: whether it is whole, fits into memory, and into its disk or cache. Needs Cropfeed's packages."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import UserError
from ..store import files
from ..store.cache import FREE_SHARE, ShardCache, choose_cache
from ..store.shards import Manifest
from .lines import Asked, Line, install
from .machine import GB, available_memory, free_disk


def check(asked: Asked, data: str) -> list[Line]:
    """data: `asked.data`."""
    try:
        manifest = Manifest(data)
        sizes = file_sizes(manifest)
    except UserError as error:
        return [broken("data", error)]
    remote = files.is_remote(manifest.root)
    if not remote and (wrong := damaged_files(manifest, sizes)):
        found = f"missing or of another size: {len(wrong)} of {len(sizes) + len(manifest.splits)} files, first {wrong[0]}"
        return [Line("failed", "data", found, "give the command that made these shards again: it makes what is damaged")]
    total, images = sum(sizes.values()), sum(split["images"] for split in manifest.splits.values())
    found = f"{images:,} images in {len(sizes):,} files of {total / GB:.3g} GB, profile {manifest.profile}"
    cached = remote or asked.cache is not None or asked.cache_gb is not None  # as pipeline.store.shards.ShardSet decides
    disk = check_cache(asked, sizes) if cached else check_data_disk(manifest.root)
    return [Line("ok", "data", found), check_page_cache(asked, total, manifest.profile), disk]


def broken(name: str, error: UserError) -> Line:
    """A UserError says what is wrong and, behind its last semicolon, what to do."""
    found, _, remedy = " ".join(str(error).split()).rpartition("; ")
    if found:
        return Line("failed", name, found, remedy)
    if isinstance(error.__cause__, ImportError):
        return Line("failed", name, remedy, install("s3") if "s3" in remedy else "install the package that it names")
    return Line("failed", name, remedy, "the address, the credentials and the network must let this machine read it")


def file_sizes(manifest: Manifest) -> dict[str, int]:
    """Path or URL -> bytes of the files that hold the images; of tars, as the manifest says."""
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


def check_page_cache(asked: Asked, total: int, profile: str) -> Line:
    free = available_memory(asked.root)
    found = f"{total / GB:.3g} GB of data, {free / GB:.3g} GB of memory"
    if total <= free:
        return Line("ok", "page cache", found)
    smaller = "" if profile == "compact" else "; or half the bytes: shards of profile compact"
    return Line("warning", "page cache", f"{found}: every epoch reads the disk", f"--order blocks{smaller}")


def check_data_disk(root: str) -> Line:
    place, free = free_disk(Path(root))
    found = f"{free / GB:.3g} GB free on the disk of {root}"
    if free < GB and os.access(place, os.W_OK):  # a read-only disk is meant to be full
        remedy = f"make room: shards made again are written beside the old ones; du -sh {root}"
        return Line("warning", "data disk", found, remedy)
    return Line("ok", "data disk", found)


def check_cache(asked: Asked, sizes: dict[str, int]) -> Line:
    try:
        cache = choose_cache(asked.cache, asked.cache_gb)
        for url, size in sizes.items():
            cache.check(url, size)
    except UserError as error:
        return broken("cache", error)
    return check_room(cache, sum(sizes.values()))


def check_room(cache: ShardCache, total: int) -> Line:
    """Whether the cache's disk and bound let it hold the data."""
    place, free = free_disk(cache.folder)
    if not os.access(place, os.W_OK):
        return Line("failed", "cache", f"{place} cannot be written", "give another --cache (CROPFEED_CACHE)")
    room = free + sum(path.stat().st_size for path in cache.folder.glob("*"))  # what it holds it may replace
    found = f"{cache.folder}: bound {cache.limit / GB:.3g} GB, room {room / GB:.3g} GB, data {total / GB:.3g} GB"
    if min(total, cache.limit) > room:
        return Line("failed", "cache", found, f"--cache-gb {FREE_SHARE * room / GB:.3g}, or --cache FOLDER on a larger disk")
    if total > cache.limit:
        remedy = "raise --cache-gb (CROPFEED_CACHE_GB), or --order blocks: a random order downloads over and over"
        return Line("warning", "cache", found, remedy)
    return Line("ok", "cache", found)
