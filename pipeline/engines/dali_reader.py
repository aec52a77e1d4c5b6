"""DALI's own reader over our shards, for those who want stock DALI: `reader(spec)`.

It shuffles and draws by DALI's generators: the same distributions as the plan's, not the same samples and draws. So it cannot be
resumed at a sample, gives each number of ranks another sequence, and stops at a sample that cannot be decoded. For all that take
engine "dali". Windows are computed in DALI's graph, by the formulas of `pipeline.plan`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import nvidia.dali.math as dali_math
import torch
from nvidia.dali import Pipeline, fn, types

from pipeline import storage
from pipeline.augment import colour_tail, lighting
from pipeline.errors import UserError
from pipeline.geometry import CentreCrop, ScaleJitter
from pipeline.loader import Batch, choose_normalization
from pipeline.plan import Ints
from pipeline.shards import ShardSet, label_digits
from pipeline.spec import LoaderSpec, check

_READER = "shards"
_SOURCE = re.compile(r"(.+\.tar):(\d+):")  # DALI's source_info: tar, offset and name of a component


def reader(spec: LoaderSpec) -> Iterator[Batch]:
    """Batches as `Loader` gives them. Training: endless, epoch after epoch. Evaluation: this rank's share of the split, once.

    Takes scale jitter in order "full", or the central crop in order "sequential", at one image size, from local shards.
    Raises UserError for anything else.
    """
    check(spec)
    jitter = isinstance(spec.geometry, ScaleJitter) and spec.order == "full"
    if not jitter and not (isinstance(spec.geometry, CentreCrop) and spec.order == "sequential"):
        raise UserError("DALI's reader takes ScaleJitter in order full, or CentreCrop in order sequential; or take engine dali")
    if not isinstance(spec.image_size, int):
        raise UserError("DALI's reader takes one image size; for progressive resizing take engine dali")
    shards = ShardSet(spec.data, spec.split)
    if storage.is_remote(shards.manifest.root):
        raise UserError(f"{shards.manifest.root}: DALI reads local shards; copy them, or take engine dali")
    return _batches(spec, shards)


def _batches(spec: LoaderSpec, shards: ShardSet) -> Iterator[Batch]:
    assert isinstance(spec.image_size, int)
    pipe = build_pipeline(spec, shards)
    pipe.build()
    normalization = choose_normalization(spec, shards.manifest).at(spec.image_size)
    mean, std = (torch.from_numpy(array).to(spec.device) for array in (normalization.mean, normalization.std))
    basis = shards.manifest.lighting_basis()
    first, last = (len(shards) * rank // spec.world_size for rank in (spec.rank, spec.rank + 1))
    left = last - first  # this rank's samples, in evaluation; the last batch is padded
    stream = torch.cuda.current_stream(spec.device) if pipe.device_id is not None else None
    while left > 0 or spec.training:
        pictures, labels, alphas, sources = pipe.run(stream)
        pixels = torch.from_dlpack(pictures.as_tensor())  # see DaliLoader._make for the streams
        if spec.dtype == torch.uint8:
            images = pixels.permute(0, 3, 1, 2)
        else:
            shift = torch.from_numpy(lighting(np.array(alphas.as_tensor()), basis)).to(spec.device)
            images = colour_tail(pixels, shift, mean, std, spec.dtype)
        count = len(images) if spec.training else min(left, len(images))
        ids = np.array([_id(shards, bytes(sources.at(i)).decode()) for i in range(count)])
        yield Batch(images[:count], torch.from_numpy(np.array(labels.as_tensor())[:count]).to(spec.device), ids)
        left -= count


def build_pipeline(spec: LoaderSpec, shards: ShardSet) -> Pipeline:
    """Outputs: pictures, uint8 (H, W, 3); labels, int64; alphas, float32 (3,); what `_id` reads, uint8 (characters,)."""
    gpu = torch.device(spec.device).type == "cuda"
    device_id = (torch.device(spec.device).index or 0) if gpu else None
    seed = spec.seed % (1 << 63)  # DALI's are signed
    pipe = Pipeline(
        -(-spec.batch_size // spec.world_size), spec.threads, device_id, seed=seed, prefetch_queue_depth=spec.prefetch
    )
    with pipe:
        components: Any = fn.readers.webdataset(
            name=_READER,
            paths=[str(path) for path in shards.shards],
            index_paths=[str(path.with_suffix(".idx")) for path in shards.shards],
            ext=["jpg", "cls"],
            random_shuffle=spec.order == "full",
            initial_fill=4 * spec.batch_size,  # samples of the buffer that it shuffles in
            pad_last_batch=not spec.training,  # in training, batches go on into the next epoch
            shard_id=spec.rank,
            num_shards=spec.world_size,
        )
        encoded, digits = components
        powers = [10**place for place in reversed(range(label_digits(len(shards.manifest.classes))))]
        label = fn.reductions.sum((fn.cast(digits, dtype=types.INT64) - 48) * types.Constant(powers, dtype=types.INT64))
        std = spec.alpha_std if spec.geometry.random else 0.0
        alphas = fn.random.normal(shape=(3,), stddev=std) if std else types.Constant([0.0] * 3, dtype=types.FLOAT)
        pictures = _pictures(spec, encoded, gpu)
        pipe.set_outputs(pictures, label, alphas, fn.get_property(encoded, key="source_info"))
    return pipe


def _pictures(spec: LoaderSpec, encoded: Any, gpu: bool) -> Any:
    """Scale jitter or the central crop of one image, as `plan.draw`, `plan.centre` and `plan.windows` have them."""
    size, geometry = spec.image_size, spec.geometry
    sides = fn.cast(fn.peek_image_shape(encoded, adjust_orientation=False)[0:2], dtype=types.FLOAT)
    side = dali_math.min(sides[0], sides[1])
    if isinstance(geometry, ScaleJitter):
        scale = side / dali_math.floor(fn.random.uniform(range=(geometry.low, geometry.high + 1)))
        resized = dali_math.floor(sides / scale + 0.5)
        place = fn.random.uniform(range=(0, 1), shape=(2,)) * (resized - size + 1)
        corner = dali_math.min(dali_math.floor(place), resized - size)
        flip = fn.cast(fn.random.coin_flip(), dtype=types.FLOAT)
    else:
        assert isinstance(geometry, CentreCrop)
        scale = side / float(geometry.short)
        resized = dali_math.floor(sides / scale + 0.5)
        corner, flip = dali_math.floor((resized - size) * 0.5), 0.0
    low = (corner - resized * 0.5) * scale + sides * 0.5
    high = dali_math.min(low + size * scale, sides)
    low = dali_math.max(low, 0.0)
    margin = dali_math.max(scale, 1.0) + 1.0
    start = dali_math.max(dali_math.floor(low - margin), 0.0)
    end = dali_math.min(dali_math.ceil(high + margin), sides)
    pixels = fn.decoders.image_slice(
        encoded,
        device="mixed" if gpu else "cpu",
        start=fn.cast(start, dtype=types.INT32),
        end=fn.cast(end, dtype=types.INT32),
        axes=[0, 1],
        output_type=types.RGB,
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,
    )
    low, high = low - start, high - start
    left, right = low[1] * (1 - flip) + high[1] * flip, high[1] * (1 - flip) + low[1] * flip
    ends = fn.stack(low[0], left), fn.stack(high[0], right)
    return fn.resize(pixels, size=(size, size), roi_start=ends[0], roi_end=ends[1], dtype=types.UINT8)


def _id(shards: ShardSet, source: str) -> int:
    """A sample's place in the split, from where its image stands."""
    found = _SOURCE.match(source)
    assert found, source
    shard = shards.shards.index(Path(found[1]))
    first = sum(shards.sizes[:shard])
    offsets: Ints = shards.samples["offset"][first : first + shards.sizes[shard]].astype(np.int64)
    return first + int(np.searchsorted(offsets, int(found[2])))
