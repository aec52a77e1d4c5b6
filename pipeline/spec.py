"""What to load: `LoaderSpec`, and the check that it can be."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .errors import UserError
from .pixels.normalize import Normalization
from .plan import sampling
from .plan.geometry import CentreCrop, Geometry, PaddedCrop, ScaleJitter, WholeImage

PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # by Accelerate's names
ORDERS = ("full", "blocks", "sequential")
CORRUPT = ("replace", "stop")


@dataclass(frozen=True)
class LoaderSpec:
    """What to load. Everything that decides pixels and order is here; `engine`, `threads`, `prefetch`, `hw_decoder_load` and the
    cache decide speed alone.

    data: the shards' folder, or its URL. split: "train", "val". training: drop the ragged end of an epoch, instead of delivering
    every sample once. batch_size: images in a *global* batch, over all ranks.
    order: "full", "blocks" or "sequential", see `pipeline.plan.order`; block_shards: shards in a block.
    image_size: the crop's side, pixels. Or steps ((0, 128), (6, 160), (12, 224)), "from this epoch on, this size", for
    progressive resizing. geometry: which part of an image becomes a picture, see `plan.geometry`; meant for the final size,
    in proportion for the others. alpha_std: standard deviation of the PCA coefficients where the geometry is random, 0 for none.
    normalization: what the colour tail subtracts and divides by; "pixel" and "channel" take the data set's own mean and no
    division. dtype: of the images: float32, float16, bfloat16, or uint8 for plain pixels without the colour tail.
    corrupt: what happens at a sample that cannot be decoded: "replace" it by another one, or "stop".
    device: "cpu", "cuda" or "cuda:N". rank, world_size: this process's place.
    engine: a name in `pipeline.ENGINES`, or "auto". threads: decoding threads. prefetch: batches made ahead.
    decoder_share: share of the JPEGs that a GPU's hardware decoder gets, where it has one (DALI's hw_decoder_load, and its
    default); best found by trying.
    cache, cache_gb: folder and bound of the local copies of remote shards (defaults: `pipeline.store.cache.choose_cache`).
    """

    data: str | Path
    split: str = "train"
    training: bool = True
    batch_size: int = 256
    order: str = "full"
    block_shards: int = 8
    image_size: int | tuple[tuple[int, int], ...] = sampling.CROP
    geometry: Geometry = ScaleJitter()
    seed: int = 0
    normalization: Normalization | str = "pixel"
    alpha_std: float = sampling.ALPHA_STD
    dtype: torch.dtype = torch.float32
    corrupt: str = "replace"
    device: str = "cpu"
    rank: int = 0
    world_size: int = 1
    engine: str = "auto"
    threads: int = 2
    prefetch: int = 2
    hw_decoder_load: float = 0.65
    cache: str | Path | None = None
    cache_gb: float | None = None

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """The steps of `image_size`: (first epoch, size), at least one."""
        return ((0, self.image_size),) if isinstance(self.image_size, int) else self.image_size

    @property
    def final_size(self) -> int:
        """The last epochs' image size, pixels."""
        return self.sizes[-1][1]

    def size_at(self, epoch: int) -> int:
        """The image size of an epoch, pixels."""
        return next(size for first, size in reversed(self.sizes) if first <= epoch)

    def geometry_at(self, size: int) -> Geometry:
        """The geometry at an image size."""
        return self.geometry if size == self.final_size else self.geometry.scaled(size, self.final_size)

    def evaluation(self, split: str = "val", batch_size: int | None = None, geometry: Geometry | None = None) -> LoaderSpec:
        """The same for evaluation: every sample once, as stored, at the final size, and a corrupt one is an error.

        geometry: by default the central crop of the short side that is 256 for crops of 224; after padded crops, of the short
        side that is the crop's.
        """
        size = self.final_size
        centre = CentreCrop(size) if isinstance(self.geometry, PaddedCrop) else CentreCrop().scaled(size, sampling.CROP)
        return replace(
            self,
            split=split,
            training=False,
            batch_size=batch_size or self.batch_size,
            order="sequential",
            image_size=size,
            geometry=geometry or centre,
            corrupt="stop",
        )


def check_device(device: str) -> None:
    """Raise UserError for a CUDA GPU that is not there."""
    found = torch.device(device)
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {device}: torch sees no such CUDA GPU; use device cpu, or check the driver")


def check(spec: LoaderSpec) -> None:
    """Raise UserError for a spec that no engine could load."""
    firsts = [first for first, _ in spec.sizes]
    if not firsts or firsts[0] != 0 or firsts != sorted(set(firsts)):
        raise UserError(f"image size {spec.image_size}: steps are (epoch, size), the first at epoch 0, then ascending")
    for _, size in spec.sizes:
        if size < 1:
            raise UserError(f"image size must be at least 1, not {size}")
        spec.geometry_at(size).check(size)
    if isinstance(spec.geometry, WholeImage) and (spec.training, spec.order, spec.corrupt) != (False, "sequential", "stop"):
        raise UserError("whole images differ in size and are for evaluation: use spec.evaluation(geometry=WholeImage(...))")
    if min(spec.batch_size, spec.threads, spec.prefetch, spec.block_shards) < 1:
        raise UserError("batch size, threads, prefetch and block shards must be at least 1")
    if spec.training and spec.batch_size % spec.world_size:
        raise UserError(f"the global batch ({spec.batch_size}) must be a multiple of the number of processes ({spec.world_size})")
    for name, value, choices in (("order", spec.order, ORDERS), ("corrupt", spec.corrupt, CORRUPT)):
        if value not in choices:
            raise UserError(f"{name} is {' or '.join(choices)}, not {value!r}")
    if isinstance(spec.normalization, str) and spec.normalization not in ("pixel", "channel"):
        raise UserError(f"normalization is pixel, channel or a Normalization, not {spec.normalization!r}")
    if not 0 <= spec.rank < spec.world_size:
        raise UserError(f"rank {spec.rank} is not in [0, {spec.world_size})")
    if not 0 <= spec.seed < 1 << 64:
        raise UserError(f"seed must lie in [0, 2^64), not {spec.seed}")
    if not 0 <= spec.hw_decoder_load <= 1:
        raise UserError(f"decoder share must lie in [0, 1], not {spec.hw_decoder_load}")
    if spec.dtype not in (*PRECISIONS.values(), torch.uint8):
        raise UserError(f"images come as float32, float16, bfloat16 or uint8, not {spec.dtype}")
