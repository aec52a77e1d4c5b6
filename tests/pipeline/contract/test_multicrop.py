"""Several views of an image for training (`MultiCrop`): every engine keeps the contract for each size of views."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import open_loader
from pipeline.batch import Batch
from pipeline.errors import UserError
from pipeline.plan.geometry import CentreCrop, MultiCrop, RandomResizedCrop
from pipeline.spec import LoaderSpec
from tests.pipeline.contract.helpers import differences_by_group, spec_for
from tests.pipeline.contract.test_corrupt import VICTIM, damage, expected_ids
from tests.pipeline.contract.test_pixels import MEAN_LIMIT, PERCENTILE_LIMIT

GEOMETRY = MultiCrop(((48, 2, (0.3, 1.0)), (20, 3, (0.05, 0.3))))


def spec_of(data: Path, engine: str, **changes: Any) -> LoaderSpec:
    return spec_for(data, engine, **{"geometry": GEOMETRY, **changes})


def equal(found: Batch, expected: Batch) -> bool:
    pairs = zip(found.images, expected.images, strict=True)
    return found.ids.tolist() == expected.ids.tolist() and all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize(
    ("profile", "interpolation"),
    [
        ("lossless", "bilinear"),
        pytest.param("original", "bilinear", marks=pytest.mark.slow),
        pytest.param("lossless", "bicubic", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_pixels_of_all_views_equal_the_reference(
    varied: Callable[[str], Path], engine: str, profile: str, interpolation: str, device: str
) -> None:
    """With the mean image at each size, and images on which DALI's views are made on the CPU."""
    with open_loader(spec_of(varied(profile), engine, batch_size=41, device=device, interpolation=interpolation)) as loader:
        (batch_range,) = loader.batch_ranges(0, 0)
        (batch,) = loader
        found = differences_by_group(loader, loader.plan(batch_range), batch)
        assert [one.shape for one in found] == [(2 * 41, 48, 48, 3), (3 * 41, 20, 20, 3)]
        for one in found:
            assert one.reshape(len(one), -1).mean(axis=1).max() <= MEAN_LIMIT
            assert np.percentile(one.reshape(len(one), -1), 99.9, axis=1).max() <= PERCENTILE_LIMIT


def test_one_view_is_a_random_resized_crop(small: Path, engine: str) -> None:
    """Also with other views beside it: its draws are those of its number."""
    with open_loader(spec_of(small, engine, geometry=RandomResizedCrop((0.3, 1.0)), image_size=48)) as loader:
        expected = next(iter(loader)).images
    with open_loader(spec_of(small, engine)) as loader:
        large, _ = next(iter(loader)).images
    assert (large[::2] - expected).abs().max() <= 1 + 1e-3  # DALI's windows have other origins
    assert (large[1::2] - expected).abs().mean() > 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("channels_last", [True, False])
def test_each_group_is_a_tensor_of_the_specs_kind(small: Path, engine: str, dtype: torch.dtype, channels_last: bool) -> None:
    with open_loader(spec_of(small, engine, dtype=dtype, channels_last=channels_last)) as loader:
        batch = next(iter(loader))
    assert [images.shape for images in batch.images] == [(16, 3, 48, 48), (24, 3, 20, 20)]
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    assert all(images.dtype == dtype and images.is_contiguous(memory_format=memory_format) for images in batch.images)


def test_ranks_and_restarts_give_the_same_views(small: Path, engine: str) -> None:
    spec = spec_of(small, engine)
    with open_loader(spec) as loader:
        whole = list(loader)
        loader.seek(0, 40)
        assert all(equal(*pair) for pair in zip(loader, whole[5:], strict=True))
    parts = []
    for rank in range(2):
        with open_loader(replace(spec, world_size=2, rank=rank, threads=3)) as loader:
            parts.append(next(iter(loader)))
    images = tuple(torch.cat(group) for group in zip(*(part.images for part in parts), strict=True))
    assert equal(Batch(images, whole[0].labels, np.concatenate([part.ids for part in parts])), whole[0])


def test_a_corrupt_sample_is_replaced_with_all_its_views(small: Path, engine: str, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(small, tmp_path / "damaged")
    damage(tmp_path / "damaged", VICTIM, 0)
    with open_loader(spec_of(tmp_path / "damaged", engine)) as loader:
        found = list(loader)
        assert [int(sample) for batch in found for sample in batch.ids] == expected_ids(0, {VICTIM})
        loader.seek(0, 0)
        for batch_range, batch in zip(loader.batch_ranges(0, 0), found, strict=True):
            for difference in differences_by_group(loader, loader.plan(batch_range), batch):
                assert difference.mean() <= MEAN_LIMIT


def test_evaluation_takes_central_crops_of_the_largest_size(small: Path) -> None:
    spec = LoaderSpec(small, geometry=MultiCrop(((20, 3, (0.05, 0.3)), (112, 2, (0.3, 1.0)))))
    assert (spec.evaluation().geometry, spec.evaluation().image_size) == (CentreCrop(128), 112)


def test_progressive_sizes_are_refused(small: Path, engine: str) -> None:
    with pytest.raises(UserError, match=r"image_size.*MultiCrop"):
        open_loader(spec_of(small, engine, image_size=((0, 16), (2, 48))))
