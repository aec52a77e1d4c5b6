"""Region-addressable JPEG on one core: python tools/bench/bench_region.py ORIGINAL LOSSLESS COMPACT

The arguments are three folders of shards of the same images, made by make_shards.py with the three profiles. The benchmark takes
training images, with the plan's draws of a 224 crop at S in 256..480, and measures:

- decoding of the whole image, of the region by libjpeg-turbo's own partial decoding, and of a cut of the region. All three use
  the same libjpeg-turbo with its exact settings (jpeg_decode.c, compiled here). They take turns image by image, and each image's
  best of three passes counts, so that a busy machine slows down all of them alike. Ratios are taken within each repeat. Before
  the measurement, the benchmark checks that all three give the same pixels;
- cutting alone, transcoding (images/s), and the size of each folder's images.

Files that can be cut have restart markers, which disable libjpeg-turbo's fast Huffman decoding. The rows "against original"
therefore compare with the original files. Rows go to tools/bench/results/region.csv.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import _path  # noqa: F401
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from pipeline.cli import Parser, positive, run_cli
from pipeline.errors import UserError
from pipeline.jit import Int
from pipeline.jpeg.region import Bytes, RegionError, cut
from pipeline.jpeg.transcode import transcode
from pipeline.plan import sampling
from pipeline.store.shards import ShardSet
from tools.bench.recording import RESULTS, Figure, record

REPEATS = 5
PASSES = 3  # over the images in a repeat; the shortest time of each image counts
CHECKED = 50  # number of images for the comparison of pixels before the measurement
Regions = npt.NDArray[np.int64]
INSTALL = "apt-get install gcc libjpeg62-turbo-dev"


class Decoder:
    """libjpeg-turbo, compiled from jpeg_decode.c. Each call overwrites the output of the one before."""

    def __init__(self, size: int) -> None:
        """size: bytes of the largest image's RGB."""
        self._library = _compile(Path(__file__).with_name("jpeg_decode.c"))
        self.version = "libjpeg-turbo " + self._library.version().decode()
        self._out = np.zeros(size, np.uint8)
        self._place = np.zeros(4, np.int64)
        self._output = self._out.ctypes.data, size, self._place.ctypes.data

    def __call__(self, jpeg: Bytes, region: Regions | None = None) -> None:
        """Decode all of `jpeg` or, by partial decoding, a region: int64 (4,), top, left, bottom, right."""
        at = None if region is None else region.ctypes.data
        if self._library.decode(jpeg.ctypes.data, len(jpeg), at, *self._output):
            raise UserError(f"libjpeg-turbo: {self._library.why().decode()}")

    def inside(self, region: Regions, top: Int = 0, left: Int = 0) -> Bytes:
        """The region's pixels in the last output, uint8 (H, W, 3). top, left: position of the decoded JPEG in the image."""
        y, x, height, width = (int(value) for value in self._place)
        pixels = self._out[: height * width * 3].reshape(height, width, 3)
        y, x = y + top, x + left
        return pixels[region[0] - y : region[2] - y, region[1] - x : region[3] - x].copy()


def _compile(source: Path) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "jpeg_decode.so"
        flags = ["-O2", "-shared", "-fPIC", "-Werror=implicit-function-declaration"]  # another libjpeg has no partial decoding
        try:
            result = subprocess.run(["cc", *flags, source, "-o", built, "-ljpeg"], capture_output=True, text=True, check=False)
        except FileNotFoundError as error:
            raise UserError("no C compiler (cc), which this benchmark needs", INSTALL) from error
        if result.returncode:
            reason = next((line for line in result.stderr.splitlines() if "error" in line), "no reason given")
            raise UserError(f"{source.name} does not compile ({reason})", INSTALL)
        library = ctypes.CDLL(str(built))
    library.version.restype = library.why.restype = ctypes.c_char_p
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    library.decode.argtypes = [pointer, size, pointer, pointer, size, pointer]
    return library


class Folder(NamedTuple):
    """The measured images of one folder, in memory."""

    name: str
    jpegs: list[Bytes]
    records: npt.NDArray[np.void]
    ids: list[int]

    def regions(self, epoch: int) -> Regions:
        """The region that an engine decodes of each image, whole pixels, int64 (N, 4)."""
        heights, widths = self.records["height"].astype(np.int64), self.records["width"].astype(np.int64)
        windows = sampling.windows(sampling.draw(0, epoch, self.ids, heights, widths), heights, widths, sampling.CROP)
        return sampling.regions(windows, heights, widths, sampling.CROP)


def read_folders(paths: list[Path], count: int) -> list[Folder]:
    """Evenly spaced images of the original, lossless and compact folders. Images that are not baseline JPEGs are left out."""
    stored = [ShardSet(path, "train") for path in paths]
    for path, other in zip(paths, stored, strict=True):
        if len(other) != len(stored[0]) or not np.array_equal(other.samples["label"], stored[0].samples["label"]):
            raise UserError(f"{path}: contains other images than {paths[0]}", "make both from the same source")
    ids = []
    for index in np.unique(np.linspace(0, len(stored[0]) - 1, count).astype(int)).tolist():
        try:
            transcode(stored[0].read(index).tobytes())
            ids.append(index)
        except RegionError:
            continue
    if not ids:
        raise UserError(f"{paths[0]}: no baseline JPEG among the images", "give shards of ordinary JPEGs")
    return [
        Folder(path.resolve().name, [one.read(index).copy() for index in ids], one.samples[ids], ids)
        for path, one in zip(paths, stored, strict=True)
    ]


def check(folder: Folder, decode: Decoder, methods: list[str]) -> None:
    """Check that these METHODS give the same pixels in the region."""
    for index, jpeg, region in zip(folder.ids[:CHECKED], folder.jpegs, folder.regions(0), strict=False):
        found = []
        for name in methods:
            try:
                piece = cut(jpeg, *region.tolist()) if "cut" in name else None
            except RegionError as error:
                raise UserError(f"{folder.name}: image {index}: {error}", "make the shards again") from error
            METHODS[name](decode, jpeg, region)
            found.append(decode.inside(region, piece.top, piece.left) if piece else decode.inside(region))
        if not all(np.array_equal(pixels, found[0]) for pixels in found):
            raise UserError(f"{folder.name}: image {index}: the region's pixels differ from the whole image's")


def decode_inside_cut(decode: Decoder, jpeg: Bytes, region: Regions) -> None:
    """Cut, then decode partially, because the tiles of the cut extend beyond the region."""
    piece = cut(jpeg, *region.tolist())
    decode(piece.jpeg, region - np.array((piece.top, piece.left, piece.top, piece.left)))


METHODS: dict[str, Callable[[Decoder, Bytes, Regions], None]] = {
    "whole": lambda decode, jpeg, region: decode(jpeg),
    "partial": lambda decode, jpeg, region: decode(jpeg, region),
    "cut": lambda decode, jpeg, region: decode(cut(jpeg, *region.tolist()).jpeg),
    "cut, partial": decode_inside_cut,
}


def time_decoding(folders: list[Folder], decode: Decoder, epoch: int) -> dict[tuple[str, str], float]:
    """Seconds for all images by (profile, method). All methods decode an image before the next image; each image begins with
    another method."""
    jobs = []
    for profile, folder in zip(("original", "lossless", "compact"), folders, strict=True):
        regions = folder.regions(epoch)
        names = list(METHODS)[: 2 if profile == "original" else 4]
        jobs += [((profile, name), METHODS[name], folder.jpegs, regions) for name in names]
    spent = np.full((len(jobs), len(folders[0].jpegs)), np.inf)
    for number in range(PASSES):
        for image in range(spent.shape[1]):
            for turn in range(len(jobs)):
                job = (turn + image + number) % len(jobs)
                _, method, jpegs, regions = jobs[job]
                began = time.perf_counter()
                method(decode, jpegs[image], regions[image])
                spent[job, image] = min(spent[job, image], time.perf_counter() - began)
    return {key: float(times.sum()) for (key, *_), times in zip(jobs, spent, strict=True)}


def time_cutting(folder: Folder, epoch: int) -> float:
    """Median seconds per cut."""
    spent = []
    for jpeg, window in zip(folder.jpegs, folder.regions(epoch).tolist(), strict=True):
        began = time.perf_counter()
        cut(jpeg, *window)
        spent.append(time.perf_counter() - began)
    return float(np.median(spent))


def time_transcoding(folder: Folder) -> float:
    """Images per second."""
    originals = [jpeg.tobytes() for jpeg in folder.jpegs]
    began = time.perf_counter()
    for original in originals:
        transcode(original)
    return len(originals) / (time.perf_counter() - began)


def figures(folders: list[Folder], decode: Decoder) -> list[tuple[str, str, Figure]]:
    """All figures, as (profile, benchmark, figure)."""
    count = len(folders[0].jpegs)
    named = dict(zip(("original", "lossless", "compact"), folders, strict=True))
    time_decoding(folders, decode, 0)  # warm-up
    repeats, transcoding = [], []
    cutting: dict[str, list[float]] = {"lossless": [], "compact": []}
    for epoch in tqdm(range(REPEATS), unit=" repeats"):
        repeats.append(time_decoding(folders, decode, epoch))
        for profile, values in cutting.items():
            values.append(time_cutting(named[profile], epoch) * 1e6)
        transcoding.append(time_transcoding(folders[0]))

    found = [("original", "transcode", Figure("images_per_s", transcoding))]
    for profile, method in repeats[0]:
        milliseconds = [spent[profile, method] / count * 1e3 for spent in repeats]
        found.append((profile, f"decode {method}", Figure("ms_per_image", milliseconds)))
    size = {profile: sum(map(len, folder.jpegs)) for profile, folder in named.items()}
    for profile, values in cutting.items():
        found.append((profile, "cut alone", Figure("us_per_image_median", values)))
        found.append((profile, "bytes against original", Figure("ratio", [size[profile] / size["original"]])))
        for source in (profile, "original"):
            for method in ("whole", "partial"):
                for by_cut in ("cut", "cut, partial"):
                    speedup = Figure("speedup", [spent[source, method] / spent[profile, by_cut] for spent in repeats])
                    found.append((profile, f"decode {by_cut} against {method} of {source}", speedup))
    return found


def main() -> None:
    parser = Parser(__doc__)
    for name in ("original", "lossless", "compact"):
        parser.add_argument(name, type=Path, metavar=name.upper(), help=f"folder of shards of profile {name}")
    parser.add_argument("--images", type=positive, default=1000, help="images to measure, at most (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS / "region.csv")
    args = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    folders = read_folders([args.original, args.lossless, args.compact], args.images)
    pixels = max(int((folder.records["height"].astype(np.int64) * folder.records["width"]).max()) for folder in folders)
    decode = Decoder(3 * pixels)
    for folder in folders:
        check(folder, decode, list(METHODS)[: 2 if folder is folders[0] else 4])
    for profile, benchmark, figure in figures(folders, decode):
        spec = f"{profile}, {len(folders[0].jpegs)} images of {folders[0].name}, 224 crop, S 256..480, one core"
        record(args.results, benchmark, figure, engine=decode.version, spec=spec, cache="warm")


if __name__ == "__main__":
    run_cli(main)
