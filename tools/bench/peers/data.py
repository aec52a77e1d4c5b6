"""The contenders' data, all made from one set of images. All contenders on one kind of data read the same JPEGs.

    original    the unchanged files              500       longest side at most 500 pixels, quality 90, 4:2:0
    lossless    Cropfeed's default profile       compact   Cropfeed's small profile

Each kind is a folder with shards/: tars, indices and a .beton of the same JPEGs. original and 500 also have images/: files in
class folders.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image
from tqdm import tqdm

from pipeline.cli import with_flags
from pipeline.convert.beton import BetonSettings
from pipeline.convert.make import ConvertOptions, find_images, make_shards, write_betons
from pipeline.errors import UserError
from pipeline.jpeg.region import Bytes
from pipeline.store.shards import ShardSet

KINDS = ("original", "500", "lossless", "compact")
LONGEST, QUALITY = 500, 90  # as in ffcv-imagenet's published results
SHARDS = 8  # at least: WebDataset distributes tars over workers


def prepare(images: Path, folder: Path, kinds: set[str], betons_of: set[str]) -> dict[str, str]:
    """Write these kinds of data into `folder`. Returns kind -> why its .beton could not be written.

    images: a folder of class folders of JPEGs, a tar of one, or a folder of shards. betons_of: the kinds with a .beton.
    """
    if (images / "manifest.json").exists():
        write_files(images, folder / "stored", np.ndarray.tobytes)
        images = folder / "stored"
    count, source = find_images(images, folder)
    size = max(1, count // SHARDS)
    without_beton = {}
    for kind in tqdm([kind for kind in KINDS if kind in kinds | {"original"}], "preparing", unit=" data sets"):
        out = folder / kind
        if kind == "500":
            write_files(folder / "original" / "shards", out / "images", shrink)
        given, profile = (out / "images", "original") if kind == "500" else (source, kind)
        make_shards(ConvertOptions(str(given), str(out / "shards"), profile, shard_size=size))
        if kind == "original":
            write_files(out / "shards", out / "images", np.ndarray.tobytes)
        if kind in betons_of and (why := write_beton(out / "shards")):
            without_beton[kind] = why
    return without_beton


def write_files(shards: Path, out: Path, change: Callable[[Bytes], bytes]) -> None:
    """Write the training images of shards as files, OUT/<class>/<number>.JPEG, after applying `change` to each."""
    stored = ShardSet(shards, "train")
    for index, label in enumerate(stored.samples["label"].tolist()):
        path = out / stored.manifest.classes[label] / f"{index:08d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(change(stored.read(index)))


def shrink(jpeg: Bytes) -> bytes:
    """Shrink like FFCV's RGBImageField with max_resolution 500 and jpeg_quality 90: area average (BOX), sides rounded down."""
    image = Image.open(io.BytesIO(jpeg.tobytes())).convert("RGB")
    ratio = LONGEST / max(image.size)
    if ratio < 1:
        image = image.resize((max(1, int(image.width * ratio)), max(1, int(image.height * ratio))), Image.Resampling.BOX)
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(image), QUALITY, "RGB", "420"))


def write_beton(shards: Path) -> str | None:
    """Write a .beton with the JPEGs of the tars, which stock FFCV can read. Returns None, or the reason for a failure."""
    try:
        write_betons(str(shards), BetonSettings(), len(os.sched_getaffinity(0)))
    except UserError as error:
        return with_flags(str(error))
    return None
