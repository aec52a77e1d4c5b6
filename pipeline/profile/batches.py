"""How many images a batch of any loader holds, and what they look like.

A batch is an array or a tensor, or a list, a tuple, a dictionary or a dataclass of them: the forms of PyTorch's DataLoader,
WebDataset, FFCV and DALI.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

CHANNELS = (1, 3, 4)


@dataclass(frozen=True)
class Images:
    """The images of a batch. shape, dtype, device: of the array that holds them; device as torch names it, such as "cuda:0"."""

    count: int
    shape: tuple[int, ...]
    dtype: str
    device: str

    @property
    def side(self) -> int | None:
        """The side of a square with as many pixels as an image; None if the shape is not that of images."""
        for channels, sides in ((-3, self.shape[-2:]), (-1, self.shape[-3:-1])):
            if len(self.shape) >= 3 and self.shape[channels] in CHANNELS:
                return round((sides[0] * sides[1]) ** 0.5)
        return None


def images_in(batch: Any) -> Images | None:
    """The images of a batch; None if it holds no array.

    The first array with four dimensions has one image per row. Without one, arrays with three dimensions, one of them channels,
    are single images. Otherwise the first array has one image per row.
    """
    arrays = list(_arrays(batch))
    chosen = next((found for found in arrays if len(found.shape) >= 4), None) or _single_images(batch, arrays)
    return chosen or next(iter(arrays), None)


def _single_images(batch: Any, arrays: list[Images]) -> Images | None:
    """The images of a batch that is one image, perhaps with a label, or a list of such samples."""
    first = next((found for found in arrays if _is_image(found)), None)
    if first is None or any(len(found.shape) == 1 and found.count == first.count for found in arrays):
        return None  # no images, or grey images with as many labels
    is_list = isinstance(batch, list | tuple) and all(any(map(_is_image, _arrays(sample))) for sample in batch)
    return replace(first, count=len(batch) if is_list else 1)


def _is_image(found: Images) -> bool:
    return len(found.shape) == 3 and (found.shape[0] in CHANNELS or found.shape[-1] in CHANNELS)


def _arrays(batch: Any) -> Iterator[Images]:
    """All arrays with at least one dimension, from the first to the last."""
    if isinstance(batch, Mapping):
        parts: Any = batch.values()
    elif isinstance(batch, list | tuple):
        parts = batch
    elif is_dataclass(batch):
        parts = [getattr(batch, field.name) for field in fields(batch)]
    elif hasattr(batch, "getbands"):  # Pillow
        yield Images(1, (batch.height, batch.width, len(batch.getbands())), "uint8", "cpu")
        return
    else:
        shape = getattr(batch, "shape", ())
        if callable(shape):  # a TensorList of DALI: one shape for each image
            parts = shape()
            shape = (len(parts), *parts[0]) if parts and isinstance(parts[0], list | tuple) else tuple(parts)
        if len(shape):
            dtype = str(getattr(batch, "dtype", "")).rpartition(".")[2]
            yield Images(int(shape[0]), tuple(map(int, shape)), dtype, str(getattr(batch, "device", "cpu")))
        return
    for part in parts:
        yield from _arrays(part)
