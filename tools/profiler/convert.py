"""Conversions for a profile: temporary shards of a folder or tar of images, and a sample of the data set in another shard
profile."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline.convert.beton import BetonSettings
from pipeline.convert.make import ConvertOptions, find_images, make_shards, write_betons
from pipeline.cores import usable_cores
from pipeline.errors import UserError
from pipeline.spec import LoaderSpec
from pipeline.store import files
from pipeline.store.shards import ShardSet
from tools.profiler.measuring import Budget
from tools.profiler.remedies import Converted
from tools.profiler.stages import Stages, measure_warm

SAMPLE = 256  # images to convert, evenly spread over the split
SHARDS = 8  # at least this many, so that cold reads are spread over several files


@contextmanager
def shards_of(data: str, beton: bool) -> Iterator[str]:
    """`data` itself if it is a data set of shards. For a folder or tar of images: lossless shards in a temporary folder.

    beton: also write FFCV's file.
    """
    if files.is_remote(data) or (Path(data) / "manifest.json").exists():
        yield data
        return
    with tempfile.TemporaryDirectory(prefix="cropfeed-profile-") as name:
        folder = Path(name)
        count, source = find_images(Path(data), folder)
        print(f"{data}: is not a folder of shards; converting its {count} images to temporary shards", file=sys.stderr)
        convert(source, folder / "shards", "lossless", count, beton)
        yield str(folder / "shards")


def convert(source: Path, out: Path, profile: str, count: int, beton: bool) -> None:
    """Convert a folder of `count` images to at least SHARDS shards, and with `beton` to a .beton where FFCV can write one."""
    make_shards(ConvertOptions(str(source), str(out), profile, shard_size=max(1, count // SHARDS)))
    if beton:
        with suppress(UserError):  # then the FFCV engine reports what is missing
            write_betons(str(out), BetonSettings(), usable_cores())


def convert_sample(spec: LoaderSpec, profile: str, folder: Path, repeats: int, seconds: float, budget: Budget) -> Converted:
    """Convert images of the split to another profile, and measure the stages on them. folder: an empty one, for the sample."""
    shards = ShardSet(spec.data, spec.split, spec.cache, spec.cache_gb)
    chosen = np.unique(np.linspace(0, len(shards) - 1, min(SAMPLE, len(shards))).astype(np.int64))
    for sample in chosen.tolist():
        path = folder / "images" / shards.manifest.classes[int(shards.samples["label"][sample])] / f"{sample:010d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(shards.read(sample).tobytes())
    convert(folder / "images", folder / "shards", profile, len(chosen), spec.engine == "ffcv")
    converted = ShardSet(folder / "shards", "train")
    sample = replace(
        spec,
        data=folder / "shards",
        split="train",
        batch_size=min(spec.batch_size, len(converted)),
        cache=None,
        cache_gb=None,
    )
    before, stages = (
        Stages(measure_warm(each, [spec.threads], repeats, seconds, budget.until(share)), None)
        for each, share in ((spec, 0.9), (sample, 1.0))
    )
    return Converted(profile, sample, stages, before, float(converted.samples["bytes"].mean()))
