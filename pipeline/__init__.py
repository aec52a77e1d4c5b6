"""Cropfeed: labelled images as shards that decode at the crop, and batches from them by one deterministic augmentation plan.

    from cropfeed import LoaderSpec, open_loader

    loader = open_loader(LoaderSpec("/data/shards", batch_size=256))
    for images, labels, ids in loader: ...

`cropfeed.spec` says what can be loaded and `cropfeed.loader` what comes out; `plan` draws samples and augmentation, `jpeg` opens
images at the crop, `pixels` resamples and normalizes, `store` reads shards, `engines` put these together, `convert` makes shards.
(In a checkout of the repository this package is named `pipeline`.)

Names here are imported when first used: `import cropfeed` takes no time and needs no other package.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engines import ENGINES, choose_engine, open_loader
    from .errors import UserError
    from .loader import Batch, Loader
    from .pixels.normalize import TORCHVISION, Normalization
    from .plan.geometry import CentreCrop, Geometry, PaddedCrop, RandomResizedCrop, ScaleJitter, TenCrop, WholeImage
    from .spec import LoaderSpec

_HOMES = {
    ".engines": ("ENGINES", "choose_engine", "open_loader"),
    ".errors": ("UserError",),
    ".loader": ("Batch", "Loader"),
    ".pixels.normalize": ("Normalization", "TORCHVISION"),
    ".plan.geometry": (
        "CentreCrop", "Geometry", "PaddedCrop", "RandomResizedCrop", "ScaleJitter", "TenCrop", "WholeImage",
    ),
    ".spec": ("LoaderSpec",),
}  # fmt: skip
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "ENGINES", "TORCHVISION", "Batch", "CentreCrop", "Geometry", "Loader", "LoaderSpec", "Normalization", "PaddedCrop",
    "RandomResizedCrop", "ScaleJitter", "TenCrop", "UserError", "WholeImage", "choose_engine", "open_loader",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name], __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
