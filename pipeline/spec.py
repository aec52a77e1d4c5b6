"""What to load: `LoaderSpec`, and its validation."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .errors import UserError
from .pixels.normalize import Normalization
from .plan import sampling
from .plan.geometry import CentreCrop, Geometry, MultiCrop, PaddedCrop, ScaleJitter, WholeImage
from .store.waiting import TIMEOUT_S

if TYPE_CHECKING:
    from .batch import Batch

PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # by Accelerate's names
ORDERS = ("full", "blocks", "sequential")
CORRUPT = ("replace", "stop")
INTERPOLATIONS = ("bilinear", "bicubic")
NORMALIZATIONS = ("pixel", "channel", "imagenet")


@dataclass(frozen=True)
class LoaderSpec:
    """What to load. A spec is validated when a loader opens.

    These fields determine the samples, their pixels and their order:

    - data: folder or URL of the shards.
    - split: name of a split, such as "train" or "val".
    - training: if True, drop the incomplete batch at the end of an epoch; if False, return every sample exactly once.
    - batch_size: images in a *global* batch, over all ranks.
    - order: "full", "blocks" or "sequential", see `plan.order`.
    - block_shards: shards in a block, for the order "blocks".
    - image_size: side of the crop, pixels. For progressive resizing, steps of (first epoch, size), such as
      ((0, 128), (6, 160), (12, 224)). Not used with `MultiCrop`, which has sizes of its own.
    - geometry: which views (crops) are taken of an image, see `plan.geometry`. It refers to the final image size, and is scaled
      in proportion for the others.
    - interpolation: "bilinear" or "bicubic", the antialiased filter by which views are resampled, as Pillow's.
    - seed: of the order and of every random draw, 0 <= seed < 2^64.
    - normalization: a `Normalization` with mean and standard deviation; "imagenet" for `TORCHVISION`; or "pixel" or "channel" to
      subtract the data set's own mean, per pixel or per channel, without dividing.
    - alpha_std: standard deviation of the PCA lighting coefficients; 0 turns lighting off. Only random geometries use it.
    - dtype: of the images: float32, float16, bfloat16, or uint8 for pixels without lighting and normalization.
    - corrupt: "replace" a sample that cannot be decoded by another one, or "stop" with an error.
    - verify: compare the checksum of each sample that is read, for storage that returns wrong bytes without an error. A sample
      that differs counts as corrupt. Not for FFCV, whose compiled code reads the file.
    - fields: names of the samples' fields to return as `Batch.fields`, such as ("json",). Not for FFCV, whose file has none.
    - rank, world_size: this process's rank, and the number of processes.

    These fields only determine where batches are placed and how fast they are made:

    - device: of the batches: "cpu", "cuda" or "cuda:N".
    - channels_last: the memory format of images. False copies each batch to NCHW-contiguous memory.
    - collate: a function from a `Batch` to what the loader yields, such as a dict. It is called when the batch is yielded, so it
      may transform images on the device.
    - engine: a name in `ENGINES`, or "auto" for the fastest one, see `choose_engine`.
    - threads: decoding threads.
    - prefetch: batches prepared ahead.
    - hw_decoder_load: fraction of the JPEGs to decode on the GPU's hardware decoder, if it has one. Name and default are DALI's;
      the best value has to be measured.
    - cache: folder for local copies of remote shards. Defaults: see `store.cache.choose_cache`.
    - cache_gb: size limit of the cache, in gigabytes (10^9 bytes).
    - read_timeout: seconds after which a read of a shard is repeated, in case the storage hangs. The second attempt may take
      twice and the third four times as long; then an error names the shard. It applies to all reads of the process.
    """

    data: str | Path
    split: str = "train"
    training: bool = True
    batch_size: int = 256
    order: str = "full"
    block_shards: int = 8
    image_size: int | tuple[tuple[int, int], ...] = sampling.CROP
    geometry: Geometry = ScaleJitter()
    interpolation: str = "bilinear"
    seed: int = 0
    normalization: Normalization | str = "pixel"
    alpha_std: float = sampling.ALPHA_STD
    dtype: torch.dtype = torch.float32
    corrupt: str = "replace"
    verify: bool = False
    fields: tuple[str, ...] = ()
    device: str = "cpu"
    channels_last: bool = True
    collate: Callable[[Batch], Any] | None = None
    rank: int = 0
    world_size: int = 1
    engine: str = "auto"
    threads: int = 2
    prefetch: int = 2
    hw_decoder_load: float = 0.65
    cache: str | Path | None = None
    cache_gb: float | None = None
    read_timeout: float = TIMEOUT_S

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """The steps of `image_size`: (first epoch, size), at least one. For `MultiCrop`, the size of its largest views."""
        if isinstance(self.geometry, MultiCrop):
            return ((0, self.geometry.largest),)
        return ((0, self.image_size),) if isinstance(self.image_size, int) else self.image_size

    @property
    def final_size(self) -> int:
        """The image size of the last epochs, pixels."""
        return self.sizes[-1][1]

    def size_at(self, epoch: int) -> int:
        """The image size of an epoch, pixels."""
        return next(size for first, size in reversed(self.sizes) if first <= epoch)

    def geometry_at(self, size: int) -> Geometry:
        """The geometry at an image size."""
        return self.geometry if size == self.final_size else self.geometry.scaled(size, self.final_size)

    def evaluation(self, split: str = "val", batch_size: int | None = None, geometry: Geometry | None = None) -> LoaderSpec:
        """The same spec for evaluation: every sample once, in stored order, at the final size. A corrupt sample is an error.

        geometry: by default the central crop after resizing the short side. For crops of 224 the short side is 256; for other
        sizes it is in proportion; after training on padded crops it is the side of the crop.
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
    """Raise UserError for a device other than the CPU or a CUDA GPU that exists."""
    if not re.fullmatch(r"(cpu|cuda)(:\d{1,3})?", str(device)):
        raise UserError(f"`device` {device}: not supported", "use cpu, cuda or cuda:N")
    found = torch.device(device)
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UserError(f"`device` {device}: torch sees no such CUDA GPU", "use cpu, or check the driver")


def check(spec: LoaderSpec) -> None:
    """Raise UserError for a spec that no engine can load."""
    _check_sizes(spec)
    for name in ("batch_size", "threads", "prefetch", "block_shards"):
        if getattr(spec, name) < 1:
            raise UserError(f"`{name}` must be at least 1, not {getattr(spec, name)}")
    if spec.training and spec.batch_size % spec.world_size:
        raise UserError(f"`batch_size` ({spec.batch_size}) must be a multiple of the number of processes ({spec.world_size})")
    for name, choices in (("order", ORDERS), ("corrupt", CORRUPT), ("interpolation", INTERPOLATIONS)):
        if getattr(spec, name) not in choices:
            raise UserError(f"`{name}` is {' or '.join(choices)}, not {getattr(spec, name)!r}")
    if isinstance(spec.normalization, str) and spec.normalization not in NORMALIZATIONS:
        raise UserError(f"`normalization` is {', '.join(NORMALIZATIONS)} or a Normalization, not {spec.normalization!r}")
    if not 0 <= spec.rank < spec.world_size:
        raise UserError(f"`rank` {spec.rank} is not in [0, {spec.world_size})")
    if not 0 <= spec.seed < 1 << 64:
        raise UserError(f"`seed` must lie in [0, 2^64), not {spec.seed}")
    if not 0 <= spec.hw_decoder_load <= 1:
        raise UserError(f"`hw_decoder_load` must lie in [0, 1], not {spec.hw_decoder_load}")
    if not isinstance(spec.fields, tuple):
        raise UserError(f"`fields` is a tuple of names, such as ('json',), not {spec.fields!r}")
    if spec.dtype not in (*PRECISIONS.values(), torch.uint8):
        raise UserError(f"`dtype` is float32, float16, bfloat16 or uint8, not {spec.dtype}")
    check_device(spec.device)


def _check_sizes(spec: LoaderSpec) -> None:
    """Raise UserError for invalid image sizes, or a geometry that does not fit them."""
    if isinstance(spec.geometry, MultiCrop):
        spec.geometry.check(0)  # before its sizes are used
        if not isinstance(spec.image_size, int):
            raise UserError(
                "`image_size` cannot have steps with `geometry` MultiCrop, which has sizes of its own", "leave it out"
            )
    first_epochs = [first for first, _ in spec.sizes]
    if not first_epochs or first_epochs[0] != 0 or first_epochs != sorted(set(first_epochs)):
        raise UserError(f"`image_size` {spec.image_size}: steps must be (epoch, size), from epoch 0 on, in ascending order")
    for _, size in spec.sizes:
        if size < 1:
            raise UserError(f"`image_size` must be at least 1, not {size}")
        spec.geometry_at(size).check(size)
    if isinstance(spec.geometry, WholeImage) and (spec.training, spec.order, spec.corrupt) != (False, "sequential", "stop"):
        raise UserError("`geometry` WholeImage is for evaluation only", "use spec.evaluation(geometry=WholeImage(...))")
