"""The contract of all engines (`Loader`). `LoaderSpec` in `spec` describes what to load, `Batch` in `batch` what comes out.

The sequence of global batches depends only on the data and on the spec's seed, order, geometry and batch size. Each rank gets
its range of every global batch, so the sequence does not depend on the number of ranks. Training drops the incomplete batch at
the end of an epoch; since the order changes, each epoch drops other samples. Evaluation returns every sample exactly once, for
any number of ranks and any batch size.

The position of a loader is two integers: the epoch, and the number of its samples that have been returned, over all ranks. Its
checkpoint is these two and a fingerprint of the settings.

A sample that cannot be decoded at its crop is replaced by another sample, with that sample's own draws. `sampling.substitute`
chooses it. The choice depends only on the data and the plan, so the batches remain reproducible.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from .batch import Batch, BatchPlan, BatchRange
from .buffers import BufferPool, to_device
from .errors import UserError
from .jpeg.region import Bytes
from .pixels.decoder import CorruptImageError, Decoder, Pixels
from .pixels.normalize import (
    TORCHVISION,
    Floats,
    Normalization,
    Normalizer,
    lighting,
    normalize_on_device,
    stored_dtype,
    translate_tensor,
)
from .pixels.resample import KERNELS
from .plan import sampling
from .plan.geometry import MultiCrop, Views, WholeImage
from .plan.order import Blocks, ByShape, Full, Order, Sequential
from .plan.sampling import Ints
from .plan.substitutes import Substitutes
from .spec import LoaderSpec, check
from .store.shards import Manifest, ShardSet
from .store.waiting import set_timeout


class Loader(ABC):
    """An iterable over the batches of one epoch. Iterating again yields the next epoch.

    The state is `epoch` and `consumed`, the number of samples of the epoch that have been returned, over all ranks. A batch
    counts as consumed once it is yielded. Iterating again after a `break` continues with the next batch. `seek` goes to any
    position.
    `substitutes.corrupt`: the samples found so far that cannot be decoded. `replaced`: how many samples were returned in place of
    corrupt ones.
    """

    engine: str  # its name in `ENGINES`
    engine_reason: str = ""  # why `open_loader` chose this engine

    def __init__(self, spec: LoaderSpec) -> None:
        check(spec)
        set_timeout(spec.read_timeout)
        self.spec = spec
        self.shards = self._open_shards()
        if spec.fields:
            self.shards.check_fields(spec.fields)
        if spec.order == "full":  # other orders download each shard once; one rank warns for all
            self.shards.check_cache(spec.rank == 0)
        count = len(self.shards)
        self.order = self._open_order(count)
        self.total = count // spec.batch_size * spec.batch_size if spec.training else count
        if self.total == 0:
            raise UserError(f"{spec.data}: {count} images in {spec.split}, fewer than one batch of {spec.batch_size}")
        self.crops = spec.geometry.crops
        self.classes = self.shards.manifest.classes
        self.lighting_basis: Floats = self.shards.manifest.lighting_basis()
        self._stored_normalization = choose_normalization(spec, self.shards.manifest)
        self.normalization = self._stored_normalization.at(spec.final_size)
        self.kernel = KERNELS[spec.interpolation]
        self.buffers = BufferPool(spec.device)
        self._normalizers: dict[tuple[int, int], Normalizer] = {}
        self._on_device: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self.epoch = 0
        self.consumed = 0
        self.substitutes = Substitutes(spec.seed, count, spec.corrupt == "stop", self.locate)
        self.replaced = 0
        self._prefetched_block: tuple[int, int] | None = None
        self._ordered: dict[BatchRange, Ints] = {}  # the samples of ranges that are read ahead

    # --- What an engine implements

    @abstractmethod
    def _make_batch(self, batch_range: BatchRange) -> Batch:
        """Make the batch of a range: `plan` says which views are needed, `finish` turns their pixels into a batch.

        Ranges are requested in the order of `upcoming`, except after `close`, which `seek` calls. If a sample cannot be decoded,
        the engine calls `replace`, or `substitutes.mark` and then `plan` again.
        """

    def close(self) -> None:
        """Free threads and device memory. Iterating again starts new ones. Engines extend this."""
        self.shards.close()
        self._prefetched_block = None
        self._ordered.clear()

    def ready(self) -> int | None:
        """How many prefetched batches are ready now; None if the engine cannot tell."""
        return None

    # --- What users call

    def __len__(self) -> int:
        """Global batches in an epoch."""
        if self.spec.training:
            return self.total // self.spec.batch_size
        return int((-(-self.order.runs() // self.spec.batch_size)).sum())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Batch]:
        for batch_range in self.batch_ranges(self.epoch, self.consumed):
            try:
                batch = self._make_batch(batch_range)
                self.consumed = batch_range.stop
            except BaseException:  # including KeyboardInterrupt: the batches in progress may not fit the position
                self.close()
                raise
            if self.substitutes.corrupt:
                self.replaced += int(np.count_nonzero(batch.ids != self._samples(batch_range)))
            yield self.spec.collate(batch) if self.spec.collate else batch
        self.epoch, self.consumed = self.epoch + 1, 0

    def seek(self, epoch: int, consumed: int) -> None:
        """Go to a position: `consumed` samples into `epoch`."""
        if epoch < 0 or not 0 <= consumed <= self.total:
            raise ValueError(f"no position {consumed} in epoch {epoch} of {self.total} samples")
        self.close()  # the batches in progress belong to the old position
        self.epoch, self.consumed = epoch, consumed

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch, unless the loader is in it already: for loops written for DistributedSampler."""
        if epoch != self.epoch:
            self.seek(epoch, 0)

    def state_dict(self) -> dict[str, Any]:
        """The position, as two integers, and a fingerprint of everything that determines the following batches, as a string."""
        return {"epoch": self.epoch, "consumed": self.consumed, "fingerprint": self.fingerprint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position. Raises UserError if it was saved with other data or other augmentation."""
        if state["fingerprint"] != self.fingerprint():
            raise UserError(
                f"{self.spec.data}: the checkpoint was made with other data, seed, order, image size or augmentation",
                "resume with the same settings, or start a new run",
            )
        self.seek(state["epoch"], state["consumed"])

    def fingerprint(self) -> str:
        """A hash of the data and of all settings that affect samples or draws: not batch size, ranks, engine, dtype or device."""
        spec = self.spec
        order = [spec.order, spec.block_shards] if spec.order == "blocks" else [spec.order]
        geometry = [repr(spec.geometry), spec.alpha_std if spec.geometry.random else 0]
        geometry += [spec.interpolation] if spec.interpolation != "bilinear" else []  # older checkpoints have no such part
        mean = hashlib.sha256(self.normalization.mean.tobytes() + self.normalization.std.tobytes()).hexdigest()
        parts = [self.shards.fingerprint, spec.split, spec.training, spec.seed, order, spec.sizes, geometry, mean]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    # --- What engines call

    def batch_ranges(self, epoch: int, start: int) -> Iterator[BatchRange]:
        """This rank's ranges of an epoch's global batches, from position `start` on. Empty ranges are left out."""
        ends = np.cumsum(self.order.runs())
        while start < self.total:
            end = int(ends[np.searchsorted(ends, start, "right")])
            stop = min(start + self.spec.batch_size, end, self.total)
            if self.spec.training and stop - start < self.spec.batch_size:
                return  # resumed with another batch size; dropped, as all ranks must have the same number of batches
            low, high = sampling.rank_range(start, stop, self.spec.rank, self.spec.world_size)
            if low < high:
                yield BatchRange(epoch, low, high, stop)
            start = stop

    def upcoming(self, batch_range: BatchRange) -> Iterator[BatchRange]:
        """This range and all that follow, epoch after epoch without end, so that engines can prefetch across epochs.

        The images of a range are read ahead, one range earlier than it is yielded.
        """
        self._read_ahead(batch_range)
        epoch, start = batch_range.epoch, batch_range.stop
        while True:
            for following in self.batch_ranges(epoch, start):
                self._read_ahead(following)
                yield batch_range
                batch_range = following
            epoch, start = epoch + 1, 0

    def plan(self, batch_range: BatchRange) -> BatchPlan:
        """The samples of a range, and their views. Samples that are known to be corrupt are replaced."""
        if isinstance(self.order, Blocks):
            self._prefetch(self.order, batch_range)
        samples = self._ordered.pop(batch_range, None)
        return self._plan(batch_range, self._samples(batch_range) if samples is None else samples)

    def replace(self, plan: BatchPlan, index: int, reason: str) -> None:
        """Replace the sample at `index` of a plan, which cannot be decoded, by its substitute. Updates ids, sizes and views.

        Thread-safe for different samples. Raises UserError as `Substitutes` does.
        """
        self.substitutes.mark(plan.batch_range.epoch, int(plan.ids[index]), reason)
        epoch, position = plan.batch_range.epoch, plan.batch_range.low + index
        one = self._plan(plan.batch_range, self.order.samples(epoch, np.array([position])))
        plan.ids[index], plan.heights[index], plan.widths[index] = one.ids[0], one.heights[0], one.widths[0]
        views = slice(index * self.crops, (index + 1) * self.crops)
        for array, its in zip(plan.views.arrays, one.views.arrays, strict=True):
            array[views] = its

    def make_views(self, decoder: Decoder, plan: BatchPlan, index: int, out: Sequence[Pixels]) -> None:
        """Make the views of one image of a plan on the CPU. out: for each group, uint8 (crops, H, W, 3). Raises
        CorruptImageError."""
        self.decode_views(decoder, plan, index, self.read_planned(plan, index), out)

    def decode_views(self, decoder: Decoder, plan: BatchPlan, index: int, encoded: Bytes, out: Sequence[Pixels]) -> None:
        """`make_views` from the encoded image."""
        views = slice(index * self.crops, (index + 1) * self.crops)
        windows, flip = plan.views.windows[views], plan.views.flip[views]
        decoder.make_groups(encoded, int(plan.heights[index]), int(plan.widths[index]), windows, flip, out, self.kernel)

    def read_planned(self, plan: BatchPlan, index: int) -> Bytes:
        """The encoded image at `index` of a plan, as `read` returns it. Puts its fields into the plan, if the spec names any."""
        if not self.spec.fields:
            return self.read(int(plan.ids[index]))
        image, plan.fields[index] = self.shards.read_with_fields(int(plan.ids[index]))
        return image

    def make_or_replace(self, decoder: Decoder, plan: BatchPlan, index: int, out: Sequence[Pixels]) -> None:
        """Like `make_views`, but replaces an image that cannot be decoded in `plan`, until a substitute can be decoded."""
        while True:
            try:
                return self.make_views(decoder, plan, index, out)
            except CorruptImageError as error:
                self.replace(plan, index, str(error))

    def finish(self, pixels: Sequence[torch.Tensor], plan: BatchPlan) -> Batch:
        """The batch of a plan's views, without waiting for the device.

        pixels: for each group, (N * crops, H, W, 3) on the spec's device. If they are uint8, shift, lighting and normalization
        are applied here. If they have the spec's floating-point dtype, the engine has applied them.
        """
        labels = self._to_device(self.shards.samples["label"][plan.ids].astype(np.int64))
        fields = {name: [found.get(name, b"") for found in plan.fields] for name in self.spec.fields}
        images = [self._images(*group) for group in zip(pixels, plan.by_group(), strict=True)]
        if not self.spec.channels_last:
            images = [one.contiguous() for one in images]
        return Batch(tuple(images) if isinstance(self.spec.geometry, MultiCrop) else images[0], labels, plan.ids, fields)

    def _images(self, pixels: torch.Tensor, views: Views) -> torch.Tensor:
        """A batch's images of views of one size, see `finish`."""
        if views.shift is not None and pixels.dtype == torch.uint8:
            pixels = translate_tensor(pixels, self._to_device(views.shift))
        if pixels.dtype == self.spec.dtype:
            return pixels.permute(0, 3, 1, 2)
        shift, size = lighting(views.alphas, self.lighting_basis), (pixels.shape[1], pixels.shape[2])
        if pixels.device.type == "cpu":
            out, images = self.buffers.acquire(tuple(pixels.shape), stored_dtype(self.spec.dtype))
            self.normalizer(size)(pixels.numpy(), shift, out)
            return images.view(self.spec.dtype).permute(0, 3, 1, 2)
        if size not in self._on_device:
            normalization = self.normalization_at(size)
            self._on_device[size] = self._to_device(normalization.mean), self._to_device(normalization.std)
        return normalize_on_device(pixels, self._to_device(shift), *self._on_device[size], self.spec.dtype)

    def normalizer(self, size: tuple[int, int]) -> Normalizer:
        """Lighting and normalization on the CPU for views of `size` (height, width). Thread-safe."""
        if size not in self._normalizers:
            self._normalizers[size] = Normalizer(self.normalization_at(size), size[1])
        return self._normalizers[size]

    def normalization_at(self, size: tuple[int, int]) -> Normalization:
        """The normalization for views of `size` (height, width). Whole images differ in size, so they get the channel mean."""
        if isinstance(self.spec.geometry, WholeImage):
            return self._stored_normalization.per_channel()
        return self._stored_normalization.at(size[0])

    def read(self, sample: int) -> Bytes:
        """A sample's encoded image: uint8 (bytes,). Raises CorruptImageError if `verify` is set and its checksum is wrong."""
        return self.shards.read(sample)

    def locate(self, sample: int) -> str:
        """File and key of a sample, for messages."""
        return self.shards.locate(sample)

    # --- Implementation

    def _open_shards(self) -> ShardSet:
        """An engine with its own files (FFCV) overrides this."""
        return ShardSet(self.spec.data, self.spec.split, self.spec.cache, self.spec.cache_gb, verify=self.spec.verify)

    def _sizes(self, ids: Ints) -> tuple[Ints, Ints]:
        return self.shards.image_sizes(ids)

    def _read_ahead(self, batch_range: BatchRange) -> None:
        """Read the images of a range ahead, without looking for substitutes, which are rare."""
        self._ordered[batch_range] = self._samples(batch_range)
        self.shards.read_ahead(self._ordered[batch_range], bool(self.spec.fields))

    def _samples(self, batch_range: BatchRange) -> Ints:
        return self.order.samples(batch_range.epoch, np.arange(batch_range.low, batch_range.high))

    def _plan(self, batch_range: BatchRange, samples: Ints) -> BatchPlan:
        spec = self.spec
        ids = self.substitutes.apply(batch_range.epoch, samples)
        heights, widths = self._sizes(ids)
        size = spec.size_at(batch_range.epoch)
        geometry = spec.geometry_at(size)
        views = geometry.views(spec.seed, batch_range.epoch, ids, heights, widths, size, spec.alpha_std)
        groups = geometry.groups_of(heights, widths, size)  # equal for all samples, see ByShape
        return BatchPlan(batch_range, ids, views, heights, widths, groups, [{} for _ in ids])

    def _open_order(self, count: int) -> Order:
        spec = self.spec
        if isinstance(spec.geometry, WholeImage):
            return ByShape(spec.geometry.shapes(*self._sizes(np.arange(count)), spec.final_size))
        if spec.order == "full":
            return Full(count, spec.seed)
        if spec.order == "blocks":
            if not len(self.shards.sizes):
                raise UserError(f"{spec.data}: holds only FFCV files; blocks need shards", "use `order` full")
            return Blocks(self.shards.sizes, spec.seed, spec.block_shards)
        return Sequential(count)

    def _prefetch(self, order: Blocks, batch_range: BatchRange) -> None:
        """At the beginning of a block, prefetch its shards and those of the next block."""
        current = batch_range.epoch, order.block(batch_range.epoch, batch_range.low)
        if current != self._prefetched_block:
            self._prefetched_block = current
            epoch, block = current
            following = (epoch, block + 1) if block + 1 < order.blocks else (epoch + 1, 0)
            self.shards.prefetch([*order.shards(*current), *order.shards(*following)])

    def _to_device(self, array: npt.NDArray[Any]) -> torch.Tensor:
        return to_device(array, self.spec.device)


def choose_normalization(spec: LoaderSpec, manifest: Manifest) -> Normalization:
    """The spec's normalization. A mean image has its stored size."""
    if isinstance(spec.normalization, Normalization):
        return spec.normalization
    if spec.normalization == "imagenet":
        return TORCHVISION
    return Normalization.of(manifest.mean_image() if spec.normalization == "pixel" else manifest.channel_mean())
