"""Opens a .beton file and checks every number in it, because FFCV's reader and compiled code check none.

The file's metadata repeats what samples.npy says of each image, and its allocation table says where the images are. Both are
compared here, with NumPy, so that one flipped bit in them is found when the file is opened. Damage in the images themselves is
left to the decoders, as for images in tars.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from ffcv.fields import IntField, RGBImageField
from ffcv.types import ALLOC_TABLE_TYPE, CURRENT_VERSION, TYPE_ID_HANDLER, FieldDescType, HeaderType, get_metadata_type

from ..errors import UserError
from ..store.tar import Samples
from .ffcv_field import JPEG, RAW

FIELDS = {"image": RGBImageField, "label": IntField}
_MODES = {"raw": (RAW,), "jpg": (JPEG,)}  # of the images, by the mode of the file; others have both
_METADATA = get_metadata_type([field() for field in FIELDS.values()])
_METADATA_START = HeaderType.itemsize + len(FIELDS) * FieldDescType.itemsize
Sizes = npt.NDArray[np.int64]


class Beton(NamedTuple):
    """An open file. content: uint8, mapped. images: FFCV's record of each image. sizes: int64 (N,), bytes of each image."""

    content: npt.NDArray[np.uint8]
    images: npt.NDArray[Any]
    sizes: Sizes


def stored_sizes(samples: Samples, settings: Mapping[str, Any]) -> tuple[Sizes, Sizes]:
    """Heights and widths in the file: int64 (N,) each, as RGBImageField computes them. settings: as in the manifest."""
    heights, widths = samples["height"].astype(np.int64), samples["width"].astype(np.int64)
    if settings["max_resolution"] is None or settings["mode"] == "region":
        return heights, widths
    ratio = np.minimum(settings["max_resolution"] / np.maximum(heights, widths), 1)
    return (ratio * heights).astype(np.int64), (ratio * widths).astype(np.int64)


def open_beton(path: Path, samples: Samples, settings: Mapping[str, Any]) -> Beton:
    """Open a file that holds `samples`, stored with `settings`. Raises UserError if it cannot be read, or does not match them."""
    advice = "make the shards again with `format` both"
    try:
        content = np.memmap(path, np.uint8, "r")
        table_start = len(content) - len(samples) * ALLOC_TABLE_TYPE.itemsize
        if problem := _check_header(content, table_start, len(samples)):
            raise UserError(f"{path}: is damaged, or is another file than manifest.json says ({problem})", advice)
        metadata = np.fromfile(path, _METADATA, len(samples), offset=_METADATA_START)
        table = np.fromfile(path, ALLOC_TABLE_TYPE, offset=table_start)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})", advice) from error
    for problem, is_bad in _comparisons(metadata, table, table_start, samples, settings):
        if is_bad.any():
            raise UserError(f"{path}: is damaged ({problem} of sample {int(is_bad.argmax())})", advice)
    metadata.setflags(write=False)
    return Beton(content, metadata["f0"], table["size"].astype(np.int64))


def _check_header(content: npt.NDArray[np.uint8], table_start: int, count: int) -> str:
    """What is wrong with the header, the fields' names and types, or the file's size; "" if nothing is."""
    if table_start < _METADATA_START + count * _METADATA.itemsize:
        return f"{len(content)} bytes are too few for {count} samples"
    header = content[: HeaderType.itemsize].view(HeaderType)[0]
    fields = content[HeaderType.itemsize : _METADATA_START].view(FieldDescType)
    page = int(header["page_size"])
    expected = {"version": CURRENT_VERSION, "num_fields": len(FIELDS), "num_samples": count, "alloc_table_ptr": table_start}
    for name, value in expected.items():
        if header[name] != value:
            return f"its {name} is {header[name]}, not {value}"
    if page == 0 or page & (page - 1):
        return f"its page_size is {page}, not a power of two"
    for field, (name, kind) in zip(fields, FIELDS.items(), strict=True):
        if TYPE_ID_HANDLER.get(int(field["type_id"])) is not kind or field["name"].tobytes() != name.encode().ljust(16, b"\0"):
            return f"its fields are not {' and '.join(FIELDS)}"
    return ""


def _comparisons(
    metadata: Any, table: Any, table_start: int, samples: Samples, settings: Mapping[str, Any]
) -> Iterator[tuple[str, npt.NDArray[np.bool_]]]:
    """What may be wrong, and for which samples it is."""
    images, starts, sizes = metadata["f0"], table["ptr"], table["size"]
    heights, widths = stored_sizes(samples, settings)
    yield "the label", metadata["f1"] != samples["label"]
    yield "the height", images["height"] != heights
    yield "the width", images["width"] != widths
    yield "the mode", ~np.isin(images["mode"], _MODES.get(settings["mode"], (JPEG, RAW)))
    yield "the address", images["data_ptr"] != starts
    yield "the number", table["sample_id"] != np.arange(len(table))
    yield "the size", (sizes == 0) | (sizes > table_start)  # first, so that the sums below do not overflow
    yield "the address", (starts < _METADATA_START + metadata.nbytes) | (starts > table_start - sizes)
    yield "the size", np.append(starts[1:] < starts[:-1] + sizes[:-1], False)
    yield "the size", (images["mode"] == RAW) & (sizes != 3 * heights * widths)
    if settings["mode"] == "region":
        yield "the size", (images["mode"] == JPEG) & (sizes != samples["bytes"])
