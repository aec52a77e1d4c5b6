"""Region-addressable JPEG on one core: python tools/bench_region.py DATA

DATA is a folder of shards. Measures, on its training images and in alternating repeats: writing the format (images/s, bytes
against the original's); decoding for a crop of 224 at S in 256..480 (the plan's draws) by cutting first, against decoding the
whole image, both by libjpeg-turbo with its exact settings. Rows go to tools/results/region.csv.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import _path
import numpy as np
import numpy.typing as npt
import simplejpeg
from recording import Figure, record
from tqdm import tqdm

from pipeline import plan
from pipeline.errors import Parser, run_cli
from pipeline.region import RegionError, cut
from pipeline.shards import ShardSet
from pipeline.transcode import transcode

REPEATS = 5


def decode(data: bytes | memoryview) -> npt.NDArray[np.uint8]:
    pixels: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False)
    return pixels


def seconds(work: Callable[..., object], calls: Iterable[tuple[Any, ...]]) -> float:
    """How long it takes to call `work` with each of these arguments."""
    began = time.perf_counter()
    for arguments in calls:
        work(*arguments)
    return time.perf_counter() - began


def regions(stored: ShardSet, ids: list[int], epoch: int) -> npt.NDArray[np.int64]:
    """What an engine needs of each image, whole pixels, int64 (N, 4)."""
    records = stored.samples[ids]
    heights, widths = records["height"].astype(np.int64), records["width"].astype(np.int64)
    windows = plan.windows(plan.draw(0, epoch, ids, heights, widths), heights, widths, plan.CROP)
    return plan.regions(windows, heights, widths, plan.CROP)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("data", type=Path, metavar="DATA", help="folder of shards of original files")
    parser.add_argument("--results", type=Path, default=_path.ROOT / "tools" / "results" / "region.csv")
    args = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    stored = ShardSet(args.data, "train")
    originals, written, ids = [], [], []
    for index in tqdm(range(len(stored)), unit=" images"):
        data = stored.read(index).tobytes()
        try:
            written.append(np.frombuffer(transcode(data), np.uint8))
        except RegionError:
            continue
        originals.append(data)
        ids.append(index)
    count = len(ids)
    ratio = sum(map(len, written)) / sum(map(len, originals))

    for jpeg, at in zip(written, regions(stored, ids, 0), strict=True):  # warm-up
        decode(cut(jpeg, *map(int, at)).jpeg.data)
    writing, whole, cutting, cut_decode, speedup = [], [], [], [], []
    for epoch in tqdm(range(REPEATS), unit=" repeats"):
        pairs = [(data, tuple(map(int, at))) for data, at in zip(written, regions(stored, ids, epoch), strict=True)]
        writing.append(count / seconds(transcode, ((data,) for data in originals)))
        full = seconds(decode, ((data,) for data in originals))
        cut_alone = seconds(cut, ((data, *at) for data, at in pairs))
        both = seconds(lambda data, *at: decode(cut(data, *at).jpeg.data), ((data, *at) for data, at in pairs))
        whole.append(full / count * 1e3)
        cutting.append(cut_alone / count * 1e6)
        cut_decode.append(both / count * 1e3)
        speedup.append(full / both)
    spec = f"{args.data.name}, {count} of {len(stored)} images, 224 crop, S 256..480, one core"
    for name, figure in (
        ("transcode", Figure("images_per_s", writing)),
        ("transcode", Figure("bytes_ratio", [ratio])),
        ("decode whole", Figure("ms_per_image", whole)),
        ("cut", Figure("us_per_image", cutting)),
        ("cut and decode", Figure("ms_per_image", cut_decode)),
        ("cut and decode against whole", Figure("ratio", speedup)),
    ):
        record(args.results, name, figure, engine="libjpeg-turbo (simplejpeg)", spec=spec, cache="warm")


if __name__ == "__main__":
    run_cli(main)
