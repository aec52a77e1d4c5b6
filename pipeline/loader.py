"""What to load (`LoaderSpec`), what comes out (`Batch`), and the contract that every engine keeps (`Loader`).

The sequence of global batches depends on the data, the seed and the batch size alone. Rank r of R gets its part of each
global batch, so it does not depend on R. Training drops the ragged end of an epoch (other samples each time, as the order
changes); evaluation counts every sample exactly once, for any R and batch size.

A checkpoint of the input is two integers: the epoch, and how many samples of it have been handed out over all ranks.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline import plan
from pipeline.augment import Floats, Normalization
from pipeline.errors import UserError
from pipeline.plan import Draws, Ints
from pipeline.shards import ShardSet

PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # by Accelerate's names


@dataclass(frozen=True)
class LoaderSpec:
    """What to load. Everything that decides pixels and order is here; `engine`, `threads` and `prefetch` decide speed alone.

    data: the shards' folder, or its URL. split: "train", "val". training: shuffle and augment, or sequential and centre crop.
    batch_size: images in a *global* batch, over all ranks. image_size: the crop's side, pixels.
    scale: the inclusive range of the resized short side in training, pixels; eval_short: the short side in evaluation.
    normalization: what the colour tail subtracts and divides by; "pixel" and "channel" take the data set's own mean and no
    division. alpha_std: standard deviation of the PCA coefficients, 0 for no colour augmentation.
    dtype: of the images (float32, float16 or bfloat16). device: "cpu", "cuda" or "cuda:N".
    rank, world_size: this process's place. engine: a name in `pipeline.ENGINES`, or "auto".
    threads: decoding threads. prefetch: batches made ahead.
    cache, cache_gb: folder and bound of the local copies of remote shards (defaults: `pipeline.cache.choose_cache`).
    """

    data: str | Path
    split: str = "train"
    training: bool = True
    batch_size: int = 256
    image_size: int = plan.CROP
    scale: tuple[int, int] = plan.SCALE
    eval_short: int = plan.EVAL_SHORT
    seed: int = 0
    normalization: Normalization | str = "pixel"
    alpha_std: float = plan.ALPHA_STD
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    rank: int = 0
    world_size: int = 1
    engine: str = "auto"
    threads: int = 2
    prefetch: int = 2
    cache: str | Path | None = None
    cache_gb: float | None = None

    def evaluation(self, split: str = "val", batch_size: int | None = None) -> LoaderSpec:
        """The same for evaluation: sequential, centre crop, every sample once."""
        return replace(self, split=split, training=False, batch_size=batch_size or self.batch_size)


class Batch(NamedTuple):
    """This rank's part of a global batch of which it holds N images.

    images: (N, 3, H, W) in channels-last memory, of the spec's dtype, on its device. labels: int64 (N,), same device.
    ids: int64 (N,), NumPy: places of the samples in the split.
    """

    images: torch.Tensor
    labels: torch.Tensor
    ids: Ints


class Part(NamedTuple):
    """One rank's part of one global batch: positions [low, high) of the epoch. stop: where the global batch ends."""

    epoch: int
    low: int
    high: int
    stop: int


class Work(NamedTuple):
    """A part, planned: what an engine must make.

    ids: int64 (N,). draws: of N. windows: float64 (N, 4), source pixels. heights, widths: int64 (N,), source pixels.
    """

    part: Part
    ids: Ints
    draws: Draws
    windows: Any
    heights: Ints
    widths: Ints


class Loader(ABC):
    """Iterates over the rest of the current epoch, then stands at the start of the next one.

    `epoch` and `consumed` (samples of the epoch handed out, over all ranks) are the whole state. A batch counts as consumed
    once it is yielded. Iterating again after a `break` goes on where it stopped; `seek` goes anywhere.
    """

    engine: str  # its name in `pipeline.ENGINES`

    def __init__(self, spec: LoaderSpec) -> None:
        check(spec)
        self.spec = spec
        self.shards = ShardSet(spec.data, spec.split, spec.cache, spec.cache_gb)
        if spec.training and spec.rank == 0:  # in evaluation each shard is downloaded once; one rank says it for all
            self.shards.check_cache()
        count = len(self.shards)
        self.total = count // spec.batch_size * spec.batch_size if spec.training else count
        if self.total == 0:
            raise UserError(f"{spec.data}: {count} images in {spec.split}, fewer than one batch of {spec.batch_size}")
        manifest = self.shards.manifest
        if isinstance(spec.normalization, Normalization):
            normalization = spec.normalization
        else:
            normalization = Normalization.of(manifest.mean_image() if spec.normalization == "pixel" else manifest.channel_mean())
        self.normalization = normalization.at(spec.image_size)
        self.basis: Floats = manifest.lighting_basis()
        self.classes = manifest.classes
        self.epoch = 0
        self.consumed = 0

    @abstractmethod
    def _make(self, part: Part) -> Batch:
        """The batch of a part. Parts are asked for in the order of `parts`, epoch after epoch, except after `seek` or `close`."""

    def close(self) -> None:  # noqa: B027 - engines without threads or device memory have nothing to free
        """Free threads and device memory. The loader may be iterated again; it then starts anew."""

    def __len__(self) -> int:
        """Global batches in an epoch."""
        return -(-self.total // self.spec.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for part in self.parts(self.epoch, self.consumed):
            batch = self._make(part)
            self.consumed = part.stop
            yield batch
        self.epoch, self.consumed = self.epoch + 1, 0

    def seek(self, epoch: int, consumed: int) -> None:
        """Go to a place: `consumed` samples into `epoch`."""
        if epoch < 0 or not 0 <= consumed <= self.total:
            raise ValueError(f"no place {consumed} in epoch {epoch} of {self.total} samples")
        self.epoch, self.consumed = epoch, consumed

    def state_dict(self) -> dict[str, Any]:
        """The place, and a fingerprint of all that decides what comes next. Plain integers and a string."""
        return {"epoch": self.epoch, "consumed": self.consumed, "fingerprint": self.fingerprint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved place. Raises UserError when it was saved over other data or with other augmentation."""
        if state["fingerprint"] != self.fingerprint():
            raise UserError(
                f"{self.spec.data}: the checkpoint was made with other data, seed, image size or augmentation; "
                "resume with the same, or start a new run"
            )
        self.seek(state["epoch"], state["consumed"])

    def fingerprint(self) -> str:
        """Of the data and of every setting that decides samples or draws; not of batch size, ranks, engine or device."""
        spec = self.spec
        geometry = [spec.image_size, spec.scale, spec.alpha_std] if spec.training else [spec.image_size, spec.eval_short]
        mean = hashlib.sha256(self.normalization.mean.tobytes() + self.normalization.std.tobytes()).hexdigest()
        parts = [self.shards.manifest.fingerprint, spec.split, spec.training, spec.seed, geometry, mean]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def parts(self, epoch: int, start: int) -> Iterator[Part]:
        """This rank's parts of an epoch's global batches, from sample `start` on; empty ones are left out."""
        spec = self.spec
        for first in range(start, self.total, spec.batch_size):
            stop = min(first + spec.batch_size, self.total)
            low, high = plan.share(first, stop, spec.rank, spec.world_size)
            if low < high:
                yield Part(epoch, low, high, stop)

    def plan(self, part: Part) -> Work:
        """The samples of a part, and their draws."""
        spec = self.spec
        positions = np.arange(part.low, part.high)
        ids = plan.order(spec.seed, part.epoch, positions, len(self.shards)) if spec.training else positions
        records = self.shards.samples[ids]
        heights, widths = records["height"].astype(np.int64), records["width"].astype(np.int64)
        if spec.training:
            draws = plan.draw(spec.seed, part.epoch, ids, heights, widths, spec.scale, spec.image_size, spec.alpha_std)
        else:
            draws = plan.centre(heights, widths, spec.eval_short, spec.image_size)
        return Work(part, ids, draws, plan.windows(draws, heights, widths, spec.image_size), heights, widths)


def check(spec: LoaderSpec) -> None:
    """Raise UserError for a spec that no engine could load."""
    low, high = spec.scale
    if spec.image_size < 1:
        raise UserError(f"image size must be at least 1, not {spec.image_size}")
    if spec.training and not spec.image_size <= low <= high:
        raise UserError(f"scale {low} {high}: needs image size ({spec.image_size}) <= low <= high")
    if not spec.training and spec.eval_short < spec.image_size:
        raise UserError(f"the evaluation's short side ({spec.eval_short}) must be at least the image size ({spec.image_size})")
    if spec.batch_size < 1 or spec.threads < 1 or spec.prefetch < 1:
        raise UserError("batch size, threads and prefetch must be at least 1")
    if spec.training and spec.batch_size % spec.world_size:
        raise UserError(f"the global batch ({spec.batch_size}) must be a multiple of the number of processes ({spec.world_size})")
    if isinstance(spec.normalization, str) and spec.normalization not in ("pixel", "channel"):
        raise UserError(f"normalization is pixel, channel or a Normalization, not {spec.normalization!r}")
    if not 0 <= spec.rank < spec.world_size:
        raise UserError(f"rank {spec.rank} is not in [0, {spec.world_size})")
    if not 0 <= spec.seed < 1 << 64:
        raise UserError(f"seed must lie in [0, 2^64), not {spec.seed}")
    if spec.dtype not in PRECISIONS.values():
        raise UserError(f"images come as float32, float16 or bfloat16, not {spec.dtype}")
