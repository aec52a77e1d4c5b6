"""The kinds of sources, and which of them a folder is. Each kind has one function that lists it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..errors import UserError
from ..store import files
from .folders import has_class_folders, image_splits, list_folders
from .kaggle import find_root, list_kaggle
from .lists import list_file
from .parquet import has_images, list_parquet, parquet_files
from .sources import IMAGES, PACKED, SPLITS, Listing, SourceOptions, check, entries, split_folders, split_off
from .tars import TRAIN, VAL, list_official, official_files
from .webdataset import has_tars, list_webdataset

KINDS: dict[str, Callable[[str, SourceOptions], Listing]] = {
    "official": list_official,
    "kaggle": list_kaggle,
    "folders": list_folders,
    "webdataset": list_webdataset,
    "parquet": list_parquet,
    "list": list_file,
}
_FOR = {  # options of some kinds only
    "list": ("list",),
    "image_column": ("list", "parquet", "webdataset"),
    "label_column": ("list", "parquet", "webdataset"),
    "split_column": ("list",),
    "field_column": ("list", "parquet"),
    "val_labels": ("kaggle",),
}
_ADVICE = "give the folder above train/ and val/, which hold class folders of images; or list the images (`list`)"
_ARCHIVES = tuple(suffix for suffix in PACKED if suffix not in (".tar", ".parquet"))
_LOOKED_AT = 10  # entries of SRC that are looked at for a better level


def recognise(src: str) -> str:
    """The kind of a source, or "" if it is none."""
    if {TRAIN, VAL} & official_files(src).keys():
        return "official"
    if find_root(src):
        return "kaggle"
    if has_images(src):
        return "parquet"
    if has_class_folders(src):
        return "folders"
    if has_tars(src):
        return "webdataset"
    if split_folders(src):
        return "folders"
    return "official" if official_files(src) else ""


def list_sources(src: str, options: SourceOptions, seed: int = 0) -> tuple[str, Listing]:
    """The kind of a source, and its images. Raises UserError for a source without labelled images."""
    if not files.is_folder(src):
        raise _no_folder(src)
    kind = options.source or ("list" if options.list else _recognised(src))
    if kind not in KINDS:
        raise UserError(f"`source` is one of {', '.join(KINDS)}, not {kind}")
    for name, fitting in _FOR.items():
        if getattr(options, name) and kind not in fitting:
            raise UserError(f"`{name}` is for the source {' or '.join(fitting)}, not {kind}")
    listing = KINDS[kind](src, options)
    if options.val_share or options.val_per_class:
        listing = split_off(listing, options.val_share, options.val_per_class, seed)
    columns = [f"stored beside the images, as .json: {', '.join(options.field_column)}"] if options.field_column else []
    return kind, replace(listing, notes=[*listing.notes, *columns, *check(src, listing)])


def _recognised(src: str) -> str:
    """The kind of a source. Raises UserError, with the level that looks right, if it is none."""
    kind = recognise(src)
    inside = entries(src)
    if kind == "" or (kind == "folders" and not image_splits(src)):  # a folder of a data set may look like a class folder
        folders = [files.join(src, entry.name) for entry in inside if entry.is_folder][:_LOOKED_AT]
        if below := [folder for folder in folders if _is_source(folder)]:
            raise UserError(f"{src}: the images are in {' and '.join(below)}", f"give {'one of them' if below[1:] else below[0]}")
    if kind or parquet_files(src):
        return kind or "parquet"  # list_parquet says what is wrong with the columns
    if packed := [entry.name for entry in inside if entry.name.lower().endswith(_ARCHIVES)]:
        raise UserError(f"{src}: holds {packed[0]}", "unpack it first, and give the folder of train/ and val/ in it")
    if any(entry.name.lower().endswith(IMAGES) for entry in inside):
        raise UserError(f"{src}: holds images, but no class folders", _advice_above(src))
    raise UserError(f"{src}: {'holds no class folders' if inside else 'is an empty folder'}", _ADVICE)


def _is_source(folder: str) -> bool:
    """Whether a folder is a source, and not merely one of class folders."""
    inside = entries(folder)
    if any(entry.name.lower().endswith(IMAGES) for entry in inside):
        return False  # a class folder, which is the usual case
    if not any(entry.is_folder or entry.name.lower().endswith((".tar", ".parquet")) for entry in inside):
        return False
    kind = recognise(folder)
    return kind not in ("", "folders") or (kind == "folders" and bool(image_splits(folder)))


def _advice_above(folder: str) -> str:
    """Which folder above a folder of images looks right."""
    above = folder.rpartition("/")[0]
    top, _, name = above.rpartition("/")
    if name.lower() in SPLITS:
        return f"give {top}"
    return f"if it is a class folder, give {above}; or list the images (`list`)"


def _no_folder(src: str) -> UserError:
    if not files.exists(src):
        return UserError(f"{src}: no such folder", _ADVICE)
    name = src.lower()
    if name.endswith(_ARCHIVES):
        return UserError(f"{src}: is an archive", "unpack it first, and give the folder of train/ and val/ in it")
    if name.endswith((".tar", ".parquet")):
        return UserError(f"{src}: is a file", f"give the folder of all of them, {src.rsplit('/', 1)[0]}")
    if name.endswith(IMAGES):
        return UserError(f"{src}: is an image", _advice_above(src.rsplit("/", 1)[0]))
    return UserError(f"{src}: is a file, not a folder", _ADVICE)
