"""What comes out (`Batch`), and the contract that every engine keeps (`Loader`). `pipeline.spec` says what can be loaded.

The sequence of global batches depends on the data, the spec's seed, order, geometry and batch size alone. Rank r of R gets its
part of each global batch, so it does not depend on R. Training drops the ragged end of an epoch (other samples each time, as the
order changes); evaluation counts every sample exactly once, for any R and batch size.

A checkpoint of the input is two integers: the epoch, and how many samples of it have been handed out over all ranks.

A sample that cannot be decoded at its draw is replaced by one that `plan.substitute` names, with that one's draws. Which samples
those are is a property of data and plan, so the batches still depend on nothing else; engines only have to find them.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from .buffers import BufferPool, to_device
from .errors import UserError
from .jpeg.region import Bytes
from .pixels.decoder import CorruptImageError, Decoder, Pixels
from .pixels.normalize import Floats, Normalization, Normalizer, lighting, normalize_tensor, stored_dtype, translate_tensor
from .plan import sampling
from .plan.geometry import Views, WholeImage
from .plan.order import Blocks, ByShape, Full, Order, Sequential
from .plan.sampling import Ints
from .plan.substitutes import Substitutes
from .spec import LoaderSpec, check, check_device
from .store.shards import Manifest, ShardSet


class Batch(NamedTuple):
    """This rank's part of a global batch of which it holds N images, each in the geometry's `crops` views.

    images: (N * crops, 3, H, W) in channels-last memory, of the spec's dtype, on its device; an image's views are next to each
    other. labels: int64 (N,), same device. ids: int64 (N,), NumPy: places in the split of the samples delivered.
    """

    images: torch.Tensor
    labels: torch.Tensor
    ids: Ints


class BatchRange(NamedTuple):
    """One rank's part of one global batch: positions [low, high) of the epoch. stop: where the global batch ends."""

    epoch: int
    low: int
    high: int
    stop: int


class BatchPlan(NamedTuple):
    """A part, planned: what an engine must make.

    ids: int64 (N,). views: of V = N * crops. heights, widths: int64 (N,), source pixels. size: height and width of the pictures.
    """

    batch_range: BatchRange
    ids: Ints
    views: Views
    heights: Ints
    widths: Ints
    size: tuple[int, int]


class Loader(ABC):
    """Iterates over the rest of the current epoch, then stands at the start of the next one.

    `epoch` and `consumed` (samples of the epoch handed out, over all ranks) are the whole state. A batch counts as consumed
    once it is yielded. Iterating again after a `break` goes on where it stopped; `seek` goes anywhere.
    `substitutes.corrupt`: the samples met so far that cannot be decoded. `replaced`: samples handed out in such ones' places.
    """

    engine: str  # its name in `pipeline.ENGINES`
    why: str = ""  # it was chosen, where `open_loader` did

    def __init__(self, spec: LoaderSpec) -> None:
        check(spec)
        self.spec = spec
        check_device(spec.device)
        self.shards = self._open_shards()
        if spec.order == "full" and spec.rank == 0:  # in other orders each shard is downloaded once; one rank says it for all
            self.shards.check_cache()
        count = len(self.shards)
        self.order = self._open_order(count)
        self.total = count // spec.batch_size * spec.batch_size if spec.training else count
        if self.total == 0:
            raise UserError(f"{spec.data}: {count} images in {spec.split}, fewer than one batch of {spec.batch_size}")
        self.crops = spec.geometry.crops
        self.classes = self.shards.manifest.classes
        self.basis: Floats = self.shards.manifest.lighting_basis()
        self._stored_normalization = choose_normalization(spec, self.shards.manifest)
        self.normalization = self._stored_normalization.at(spec.final_size)
        self.buffers = BufferPool(spec.device)
        self._normalizers: dict[tuple[int, int], Normalizer] = {}
        self._on_device: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self.epoch = 0
        self.consumed = 0
        self.substitutes = Substitutes(spec.seed, count, spec.corrupt == "stop", self.where)
        self.replaced = 0
        self._hinted: tuple[int, int] | None = None

    # --- What an engine implements

    @abstractmethod
    def _make(self, batch_range: BatchRange) -> Batch:
        """The batch of a part: `finish` of the pictures that `plan` asks for.

        Parts come in the order of `upcoming`, except after `close`, which `seek` calls. A sample that cannot be decoded goes to
        `replace`, or to `substitutes.mark`, and then the part to `plan` anew.
        """

    def close(self) -> None:
        """Free threads and device memory. The loader may be iterated again; it then starts anew. Engines extend this."""
        self.shards.close()
        self._hinted = None

    def ready(self) -> int | None:
        """Batches that lie ready now, of `prefetch`; None where the engine cannot tell. Engines that can extend this."""
        return None

    # --- What users call

    def __len__(self) -> int:
        """Global batches in an epoch."""
        if self.spec.training:
            return self.total // self.spec.batch_size
        return int((-(-self.order.runs() // self.spec.batch_size)).sum())

    def __iter__(self) -> Iterator[Batch]:
        for batch_range in self.batch_ranges(self.epoch, self.consumed):
            try:
                batch = self._make(batch_range)
                self.consumed = batch_range.stop
            except BaseException:  # an interrupt, too: what is in the making may have lost its place
                self.close()
                raise
            if self.substitutes.corrupt:
                planned = self.order.samples(batch_range.epoch, np.arange(batch_range.low, batch_range.high))
                self.replaced += int(np.count_nonzero(batch.ids != planned))
            yield batch
        self.epoch, self.consumed = self.epoch + 1, 0

    def seek(self, epoch: int, consumed: int) -> None:
        """Go to a place: `consumed` samples into `epoch`."""
        if epoch < 0 or not 0 <= consumed <= self.total:
            raise ValueError(f"no place {consumed} in epoch {epoch} of {self.total} samples")
        self.close()  # what is in the making belongs to the old place
        self.epoch, self.consumed = epoch, consumed

    def state_dict(self) -> dict[str, Any]:
        """The place, and a fingerprint of all that decides what comes next. Plain integers and a string."""
        return {"epoch": self.epoch, "consumed": self.consumed, "fingerprint": self.fingerprint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved place. Raises UserError when it was saved over other data or with other augmentation."""
        if state["fingerprint"] != self.fingerprint():
            raise UserError(
                f"{self.spec.data}: the checkpoint was made with other data, seed, order, image size or augmentation; "
                "resume with the same, or start a new run"
            )
        self.seek(state["epoch"], state["consumed"])

    def fingerprint(self) -> str:
        """Of the data and of every setting that decides samples or draws; not of batch size, ranks, engine, dtype or device."""
        spec = self.spec
        order = [spec.order, spec.block_shards] if spec.order == "blocks" else [spec.order]
        geometry = [repr(spec.geometry), spec.alpha_std if spec.geometry.random else 0]
        mean = hashlib.sha256(self.normalization.mean.tobytes() + self.normalization.std.tobytes()).hexdigest()
        parts = [self._data_fingerprint(), spec.split, spec.training, spec.seed, order, spec.sizes, geometry, mean]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    # --- What engines call

    def batch_ranges(self, epoch: int, start: int) -> Iterator[BatchRange]:
        """This rank's parts of an epoch's global batches, from sample `start` on; empty ones are left out."""
        ends = np.cumsum(self.order.runs())
        while start < self.total:
            end = int(ends[np.searchsorted(ends, start, "right")])
            stop = min(start + self.spec.batch_size, end, self.total)
            if self.spec.training and stop - start < self.spec.batch_size:
                return  # resumed with another batch size: dropped, since ranks must not differ in their number of batches
            low, high = sampling.share(start, stop, self.spec.rank, self.spec.world_size)
            if low < high:
                yield BatchRange(epoch, low, high, stop)
            start = stop

    def upcoming(self, batch_range: BatchRange) -> Iterator[BatchRange]:
        """This part, then the ones after it, epoch after epoch, for ever; so that an epoch's end costs nothing."""
        yield batch_range
        epoch, start = batch_range.epoch, batch_range.stop
        while True:
            yield from self.batch_ranges(epoch, start)
            epoch, start = epoch + 1, 0

    def plan(self, batch_range: BatchRange) -> BatchPlan:
        """The samples of a part, known corrupt ones replaced, and their views."""
        if isinstance(self.order, Blocks):
            self._prefetch(self.order, batch_range)
        return self._plan(batch_range, np.arange(batch_range.low, batch_range.high))

    def replace(self, plan: BatchPlan, place: int, reason: str) -> None:
        """The sample at `place` of a part cannot be decoded: its substitute, and that one's size and views, take its place.

        For any thread; others may work at other places of the part. Raises UserError as `Substitutes` does.
        """
        self.substitutes.mark(plan.batch_range.epoch, int(plan.ids[place]), reason)
        one = self._plan(plan.batch_range, np.array([plan.batch_range.low + place]))
        plan.ids[place], plan.heights[place], plan.widths[place] = one.ids[0], one.heights[0], one.widths[0]
        views = slice(place * self.crops, (place + 1) * self.crops)
        for column, its in zip(plan.views.columns, one.views.columns, strict=True):
            column[views] = its

    def make_views(self, decoder: Decoder, plan: BatchPlan, place: int, out: Pixels) -> None:
        """Make the pictures of one image of a part on the host. out: uint8 (crops, H, W, 3). Raises CorruptImageError."""
        views = slice(place * self.crops, (place + 1) * self.crops)
        windows, flip = plan.views.windows[views], plan.views.flip[views]
        stored = self.stored(int(plan.ids[place]))
        decoder.pictures(stored, int(plan.heights[place]), int(plan.widths[place]), windows, flip, out)

    def make_or_replace(self, decoder: Decoder, plan: BatchPlan, place: int, out: Pixels) -> None:
        """The same; an image that cannot be decoded is replaced in `plan`, again if its substitute cannot be either."""
        while True:
            try:
                return self.make_views(decoder, plan, place, out)
            except CorruptImageError as error:
                self.replace(plan, place, str(error))

    def finish(self, pixels: torch.Tensor, plan: BatchPlan) -> Batch:
        """The batch of a part's pictures, without waiting for the device.

        pixels: (V, H, W, 3) on the spec's device: uint8, before the views' shift, or of the spec's floating point dtype where the
        engine has applied that and the colour tail.
        """
        labels = self._to_device(self.shards.samples["label"][plan.ids].astype(np.int64))
        if plan.views.shift is not None and pixels.dtype == torch.uint8:
            pixels = translate_tensor(pixels, self._to_device(plan.views.shift))
        if pixels.dtype == self.spec.dtype:
            return Batch(pixels.permute(0, 3, 1, 2), labels, plan.ids)
        shift = lighting(plan.views.alphas, self.basis)
        if pixels.device.type == "cpu":
            out, images = self.buffers.acquire(tuple(pixels.shape), stored_dtype(self.spec.dtype))
            self.normalizer(plan.size).batch(pixels.numpy(), shift, out)
            return Batch(images.view(self.spec.dtype).permute(0, 3, 1, 2), labels, plan.ids)
        if plan.size not in self._on_device:
            normalization = self.normalization_at(plan.size)
            self._on_device[plan.size] = self._to_device(normalization.mean), self._to_device(normalization.std)
        images = normalize_tensor(pixels, self._to_device(shift), *self._on_device[plan.size], self.spec.dtype)
        return Batch(images, labels, plan.ids)

    def normalizer(self, size: tuple[int, int]) -> Normalizer:
        """The colour tail on the CPU for pictures of `size`, height and width. For any thread."""
        if size not in self._normalizers:
            self._normalizers[size] = Normalizer(self.normalization_at(size), size[1])
        return self._normalizers[size]

    def normalization_at(self, size: tuple[int, int]) -> Normalization:
        """The normalization of pictures of `size`, height and width.

        A mean image belongs to places in a crop; whole images, which differ in size, get its channel mean.
        """
        if isinstance(self.spec.geometry, WholeImage):
            return self._stored_normalization.per_channel()
        return self._stored_normalization.at(size[0])

    # --- What an engine with files of its own (FFCV's) does otherwise

    def stored(self, sample: int) -> Bytes:
        """A sample's encoded image: uint8 (bytes,)."""
        return self.shards.read(sample)

    def where(self, sample: int) -> str:
        """File and key of a sample, for messages."""
        return self.shards.where(sample)

    def _open_shards(self) -> ShardSet:
        return ShardSet(self.spec.data, self.spec.split, self.spec.cache, self.spec.cache_gb)

    def _sizes(self, ids: Ints) -> tuple[Ints, Ints]:
        """Heights and widths of stored images, int64 (N,) each."""
        records = self.shards.samples[ids]
        return records["height"].astype(np.int64), records["width"].astype(np.int64)

    def _data_fingerprint(self) -> str:
        """Of the stored bytes and sizes."""
        return self.shards.manifest.fingerprint

    # --- How it is done

    def _plan(self, batch_range: BatchRange, positions: Ints) -> BatchPlan:
        spec = self.spec
        ids = self.substitutes.apply(batch_range.epoch, self.order.samples(batch_range.epoch, positions))
        heights, widths = self._sizes(ids)
        size = spec.size_at(batch_range.epoch)
        geometry = spec.geometry_at(size)
        views = geometry.views(spec.seed, batch_range.epoch, ids, heights, widths, size, spec.alpha_std)
        height, width = geometry.shapes(heights[:1], widths[:1], size)[0].tolist()  # one for all, see ByShape
        return BatchPlan(batch_range, ids, views, heights, widths, (height, width))

    def _open_order(self, count: int) -> Order:
        spec = self.spec
        if isinstance(spec.geometry, WholeImage):
            return ByShape(spec.geometry.shapes(*self._sizes(np.arange(count)), spec.final_size))
        if spec.order == "full":
            return Full(count, spec.seed)
        if spec.order == "blocks":
            if not self.shards.sizes:
                raise UserError(f"{spec.data}: holds FFCV files only, which have no shards to make blocks of; take order full")
            return Blocks(self.shards.sizes, spec.seed, spec.block_shards)
        return Sequential(count)

    def _prefetch(self, order: Blocks, batch_range: BatchRange) -> None:
        """At a block's beginning, ask for its shards and the next block's."""
        place = batch_range.epoch, order.block(batch_range.epoch, batch_range.low)
        if place != self._hinted:
            self._hinted = place
            epoch, block = place
            following = (epoch, block + 1) if block + 1 < order.blocks else (epoch + 1, 0)
            self.shards.prefetch([*order.shards(*place), *order.shards(*following)])

    def _to_device(self, array: npt.NDArray[Any]) -> torch.Tensor:
        return to_device(array, self.spec.device)


def choose_normalization(spec: LoaderSpec, manifest: Manifest) -> Normalization:
    """The spec's normalization; a mean image has the size that it is stored in."""
    if isinstance(spec.normalization, Normalization):
        return spec.normalization
    return Normalization.of(manifest.mean_image() if spec.normalization == "pixel" else manifest.channel_mean())


def check_turn(plan: BatchPlan, batch_range: BatchRange) -> None:
    """An engine's next batch must be the one that is asked for; it is not where two iterations take turns."""
    if plan.batch_range != batch_range:
        raise RuntimeError("two iterations over one loader at a time; open a loader for each")
