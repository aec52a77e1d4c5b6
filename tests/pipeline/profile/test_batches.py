"""The number of images in batches of all forms that loaders have."""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import default_collate

from pipeline.profile.batches import images_in

NCHW = torch.zeros(5, 3, 8, 6)
NHWC = np.zeros((5, 8, 6, 3), np.uint8)
CHW = torch.zeros(3, 8, 6)


class Pair(NamedTuple):
    images: Any
    labels: Any


@dataclass
class Sample:
    name: str
    pixels: Any


class TensorList:
    """As DALI's: `shape` is a method, and there is no dtype of NumPy."""

    def shape(self) -> list[tuple[int, ...]]:
        return [(8, 6, 3)] * 5


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        (NCHW, 5),
        (NHWC, 5),
        ((NCHW, torch.zeros(5)), 5),
        ((torch.zeros(7, 2), NCHW), 5),  # boxes of all images first
        ({"__key__": ["a"] * 5, "label": torch.zeros(5), "jpg": NHWC}, 5),
        (UserDict(pixel_values=NCHW), 5),
        (Pair(NCHW, torch.zeros(5)), 5),
        ([Sample("a", CHW), Sample("b", CHW)], 2),
        ([{"data": NHWC, "label": np.zeros((5, 1))}], 5),  # DALI for PyTorch: a dictionary for each GPU
        ((TensorList(), TensorList()), 5),
        ([NCHW, torch.zeros(5, 3, 4, 4)], 5),  # two views
        (default_collate([(CHW, 1), (CHW, 2)]), 2),
        (default_collate([{"image": CHW, "label": 1}] * 4), 4),
        ([CHW, torch.zeros(3, 9, 9)], 2),  # images of several sizes
        ([(CHW, 1), (CHW, 2), (CHW, 3)], 3),  # not collated
        ([{"image": CHW, "boxes": torch.zeros(9, 4)}] * 3, 3),
        ((CHW, 1), 1),  # a sample
        ((torch.zeros(3, 28, 28), torch.zeros(3)), 3),  # grey images with as many labels
        (torch.zeros(64, 28, 28), 64),
        ([Image.new("RGB", (8, 6))] * 4, 4),
        (torch.zeros(16, 10), 16),  # features
    ],
)
def test_images_are_counted(batch: Any, count: int) -> None:
    found = images_in(batch)
    assert found is not None
    assert found.count == count


@pytest.mark.parametrize("batch", [["a", "b"], {"label": 3}, (), b"bytes", torch.tensor(3.0), None])
def test_a_batch_without_arrays_has_no_images(batch: Any) -> None:
    assert images_in(batch) is None


@pytest.mark.parametrize(
    ("shape", "side"), [((5, 3, 8, 8), 8), ((5, 8, 8, 3), 8), ((5, 2, 3, 8, 8), 8), ((5, 3, 4, 9), 6), ((5, 28, 28), None)]
)
def test_the_side_of_images_in_both_layouts(shape: tuple[int, ...], side: int | None) -> None:
    found = images_in(torch.zeros(shape))
    assert found is not None
    assert (found.side, found.dtype, found.device, found.shape) == (side, "float32", "cpu", shape)
