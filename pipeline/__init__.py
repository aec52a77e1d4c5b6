"""Cropfeed: an image loader for training that decodes only the crop, in a deterministic order with deterministic augmentation.

    from cropfeed import LoaderSpec, open_loader

    loader = open_loader(LoaderSpec("/data/shards", batch_size=256))
    for images, labels, ids in loader: ...

Images are first converted into shards: tar files of JPEGs that can be decoded region by region. The loader decodes the region of
each crop, augments it and returns batches. Samples and augmentation depend only on the data, the seed and the epoch. Any engine,
any number of workers and ranks, and any restart therefore give the same samples with the same augmentation.

The modules, in the order to read them:

- `spec`: what to load, `LoaderSpec`.
- `loader`: the contract of all engines, `Loader`. `batch`: what a loader returns, `Batch`.
- `plan`: which sample comes when, and the random draws of its augmentation.
- `store`: shards on a local disk or in an object store, with a cache and prefetching.
- `jpeg`: the region-addressable JPEG format, its transcoder and its decoder.
- `pixels`: from an encoded image to normalized pixels.
- `engines`: implementations of `Loader` (CPU, DALI, FFCV), and `open_loader`, which chooses one.
- `convert`: from labelled images to shards.
- `cli`: the command `cropfeed`. `doctor`: its checks of the machine. `profile`: its measurements of any loader.
- `errors`, `buffers`, `cores`, `jit`, `progress`: user errors, recycled host buffers, usable cores, the numba decorator of all
  compiled functions, and progress bars.

In a checkout of the repository, this package is named `pipeline`.

The names below are imported on first use, so `import cropfeed` is fast and needs no other package.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batch import Batch
    from .engines import ENGINES, choose_engine, open_loader
    from .errors import UserError
    from .loader import Loader
    from .pixels.normalize import TORCHVISION, Normalization
    from .plan.geometry import (
        CentreCrop,
        Geometry,
        MultiCrop,
        PaddedCrop,
        RandomResizedCrop,
        ScaleJitter,
        TenCrop,
        TorchvisionCrop,
        WholeImage,
    )
    from .spec import LoaderSpec

_HOMES = {
    ".engines": ("ENGINES", "choose_engine", "open_loader"),
    ".errors": ("UserError",),
    ".batch": ("Batch",),
    ".loader": ("Loader",),
    ".pixels.normalize": ("Normalization", "TORCHVISION"),
    ".plan.geometry": (
        "CentreCrop", "Geometry", "MultiCrop", "PaddedCrop", "RandomResizedCrop", "ScaleJitter", "TenCrop", "TorchvisionCrop",
        "WholeImage",
    ),
    ".spec": ("LoaderSpec",),
}  # fmt: skip
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "ENGINES", "TORCHVISION", "Batch", "CentreCrop", "Geometry", "Loader", "LoaderSpec", "MultiCrop", "Normalization",
    "PaddedCrop", "RandomResizedCrop", "ScaleJitter", "TenCrop", "TorchvisionCrop", "UserError", "WholeImage", "choose_engine",
    "open_loader",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name], __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
