"""What the contenders read, written into a folder from one set of images, so that all of them read the same bytes.

    original    the files as they are            500       longest side at most 500 pixels, quality 90, 4:2:0
    lossless    our default profile              compact   our small one

Each is a folder with shards/ (tars, indices and a .beton of the same JPEGs) and, the first two, images/ (files in class folders).
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image
from tqdm import tqdm

from pipeline.convert import betons
from pipeline.errors import UserError
from pipeline.jpeg.region import Bytes
from pipeline.store.shards import ShardSet
from tools import make_shards

KINDS = ("original", "500", "lossless", "compact")
LONGEST, QUALITY = 500, 90  # what ffcv-imagenet's published results use
WANTED = "give a folder of class folders of JPEGs, or a tar of one"
SHARDS = 8  # at least so many tars: WebDataset deals tars to workers


def prepare(images: Path, folder: Path, kinds: set[str], betons_of: set[str]) -> dict[str, str]:
    """Write these kinds of data into `folder`, with a .beton for some. Returns kind -> why it has none, where it cannot be."""
    count, source = find_images(images, folder)
    size = max(1, count // SHARDS)
    impossible = {}
    for kind in tqdm([kind for kind in KINDS if kind in kinds | {"original"}], "preparing", unit=" data sets"):
        out = folder / kind
        if kind == "500":
            write_files(folder / "original" / "shards", out / "images", shrink)
            convert(out / "images", out / "shards", "original", size)
        else:
            convert(source, out / "shards", kind, size)
        if kind == "original":
            write_files(out / "shards", out / "images", np.ndarray.tobytes)
        if kind in betons_of and (why := write_beton(out / "shards")):
            impossible[kind] = why
    return impossible


def find_images(images: Path, folder: Path) -> tuple[int, Path]:
    """How many images there are, and the folder of class folders that holds them. A tar is unpacked into `folder`."""
    source = images
    if images.is_file():
        source = folder / "unpacked"
        try:
            with tarfile.open(images) as tar:
                tar.extractall(source, filter="data")
        except (OSError, tarfile.TarError) as error:
            raise UserError(f"{images}: cannot be unpacked ({error}); {WANTED}") from error
        while len(inside := list(source.iterdir())) == 1 and any(path.is_dir() for path in inside[0].iterdir()):
            source = inside[0]
    files = [path for path in source.glob("*/*") if path.suffix.lower() in (".jpeg", ".jpg")]
    if not files:
        raise UserError(f"{images}: holds no <class>/*.JPEG; {WANTED}")
    return len(files), source


def convert(source: Path, out: Path, profile: str, size: int) -> None:
    """Shards of `size` images. The converter's summary is left out, its progress is shown."""
    options = [str(source), "--out", str(out), "--profile", profile, "--shard-size", str(size)]
    with redirect_stdout(None):
        make_shards.make_shards(make_shards.parser().parse_args(options))


def write_files(shards: Path, out: Path, change: Callable[[Bytes], bytes]) -> None:
    """The images of shards as files, OUT/<class>/<number>.JPEG, each as `change` makes it."""
    stored = ShardSet(shards, "train")
    for index, label in enumerate(stored.samples["label"].tolist()):
        path = out / stored.manifest.classes[label] / f"{index:08d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(change(stored.read(index)))


def shrink(jpeg: Bytes) -> bytes:
    """As FFCV's RGBImageField with max_resolution 500 and jpeg_quality 90: area average (Pillow's BOX), sides rounded down."""
    image = Image.open(io.BytesIO(jpeg.tobytes())).convert("RGB")
    ratio = LONGEST / max(image.size)
    if ratio < 1:
        image = image.resize((max(1, int(image.width * ratio)), max(1, int(image.height * ratio))), Image.Resampling.BOX)
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(image), QUALITY, "RGB", "420"))


def write_beton(shards: Path) -> str | None:
    """FFCV's file of the very bytes in the tars, which stock FFCV opens. Returns why there is none, or None."""
    try:
        betons.write_betons(str(shards), betons.BetonSettings("region", None, QUALITY, 0.5), os.cpu_count() or 1)
    except UserError as error:
        return " ".join(str(error).split())
    return None
