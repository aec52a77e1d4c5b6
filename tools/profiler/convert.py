"""A sample of a data set in another profile, to learn what other shards would gain."""

from __future__ import annotations

from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline.spec import LoaderSpec
from pipeline.store.shards import ShardSet
from tools.bench.peers import data
from tools.profiler.remedies import Converted
from tools.profiler.stages import Stages, measure_warm

IMAGES = 256  # converted, evenly spread over the split


def convert_sample(spec: LoaderSpec, profile: str, folder: Path, repeats: int, seconds: float) -> Converted:
    """Convert images of the split as they are stored, and measure the stages on them. folder: empty, gets the sample."""
    shards = ShardSet(spec.data, spec.split, spec.cache, spec.cache_gb)
    chosen = np.unique(np.linspace(0, len(shards) - 1, min(IMAGES, len(shards))).astype(np.int64))
    for sample in chosen.tolist():
        path = folder / "images" / shards.manifest.classes[int(shards.samples["label"][sample])] / f"{sample:010d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(shards.read(sample).tobytes())
    with redirect_stdout(None):
        data.convert(folder / "images", folder / "shards", profile, max(1, len(chosen) // data.SHARDS))
    if spec.engine == "ffcv":
        data.write_beton(folder / "shards")
    converted = ShardSet(folder / "shards", "train")
    sample = replace(
        spec,
        data=folder / "shards",
        split="train",
        batch_size=min(spec.batch_size, len(converted)),
        cache=None,
        cache_gb=None,
    )
    before, stages = (Stages(measure_warm(each, [spec.threads], repeats, seconds), None) for each in (spec, sample))
    return Converted(profile, sample, stages, before, float(converted.samples["bytes"].mean()))
