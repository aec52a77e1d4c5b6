"""Helpers of the contract suite."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.batch import Batch, BatchPlan
from pipeline.loader import Loader
from pipeline.pixels.reference import apply
from pipeline.plan.geometry import ScaleJitter
from pipeline.spec import LoaderSpec
from tests.helpers import open_image


def spec_for(data: Path, engine: str, **changes: Any) -> LoaderSpec:
    """A small, fast spec: crops of 32, batches of 8, one thread."""
    spec = LoaderSpec(data, batch_size=8, image_size=32, geometry=ScaleJitter(36, 68), threads=1, engine=engine)
    return replace(spec, **changes)


def ids(loader: Loader) -> list[int]:
    """The sample ids of the rest of an epoch, in order."""
    return [int(sample) for batch in loader for sample in batch.ids]


def stored_image(loader: Loader, sample: int) -> Image.Image:
    """A sample as stored in the engine's file."""
    stored, record = loader.read(sample), loader.shards.samples[sample]
    size = int(record["height"]), int(record["width"])
    is_raw = loader.engine == "ffcv" and stored.size == 3 * size[0] * size[1]  # what is no JPEG
    return Image.fromarray(stored.reshape(*size, 3)) if is_raw else open_image(stored.tobytes())


def differences(loader: Loader, plan: BatchPlan, batch: Batch) -> npt.NDArray[np.float32]:
    """Absolute differences of a batch of views of one size from the reference: (V, H, W, 3)."""
    (found,) = differences_by_group(loader, plan, batch._replace(images=(batch.images,)))
    return found


def differences_by_group(loader: Loader, plan: BatchPlan, batch: Batch) -> list[npt.NDArray[np.float32]]:
    """Absolute differences of a batch from the reference, for each group of views of one size: (N * crops, H, W, 3)."""
    assert batch.ids.tolist() == plan.ids.tolist()
    expected: list[list[npt.NDArray[np.float32]]] = [[] for _ in plan.groups]
    for index, sample in enumerate(plan.ids.tolist()):
        image, view = stored_image(loader, sample).convert("RGB"), index * loader.crops
        for (crops, height, width), found in zip(plan.groups, expected, strict=True):
            normalization = loader.normalization_at((height, width))
            for window, flip, alphas, *shift in zip(*(array[view : view + crops] for array in plan.views.arrays), strict=True):
                made = apply(
                    image,
                    window,
                    bool(flip),
                    alphas,
                    (height, width),
                    loader.lighting_basis,
                    normalization,
                    shift[0] if shift else (0, 0),
                    loader.spec.interpolation,
                )
                found.append(made)
            view += crops
    actual = [images.float().permute(0, 2, 3, 1).cpu().numpy() for images in batch.images]
    return [np.abs(np.stack(found) - images) for found, images in zip(expected, actual, strict=True)]
