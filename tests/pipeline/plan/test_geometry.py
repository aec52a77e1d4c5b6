"""Geometries: the positions of windows. The contract suite tests pixels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from scipy.stats import chisquare, ks_2samp, kstest

from pipeline.errors import UserError
from pipeline.pixels.normalize import translate
from pipeline.plan import random, sampling
from pipeline.plan.geometry import (
    CentreCrop,
    Geometry,
    MultiCrop,
    PaddedCrop,
    RandomResizedCrop,
    ScaleJitter,
    TenCrop,
    TorchvisionCrop,
    Views,
    WholeImage,
    choose_geometry,
)
from tests.helpers import random_image

MANY = 40_000
AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)
GOLDEN_WINDOWS = [[16.0, 104.0, 339.0, 404.0], [140.0, 4.0, 488.0, 284.0], [0.0, 1433.0, 100.0, 1566.0]]
GOLDEN_FLIPS = [True, True, False]

BAD_GROUPS: tuple[Any, ...] = (
    (), ((224, 2),), ((0, 2, (0.3, 1.0)),), ((224, 0, (0.3, 1.0)),), ((224, 2, (0.3, 1.2)),), ((224, 2, (0.5, 0.3)),),
    (224, 2, (0.3, 1.0)), ((224, 2.5, (0.3, 1.0)),),
)  # fmt: skip

GEOMETRIES = (
    ScaleJitter(), RandomResizedCrop(), PaddedCrop(28), CentreCrop(), TenCrop(), WholeImage(), WholeImage(mirrored=True),
    TorchvisionCrop(), TorchvisionCrop(256, True, square=True), MultiCrop(),
)  # fmt: skip


def views(geometry: Geometry, heights: Any, widths: Any, size: int = 224, seed: int = 1, epoch: int = 0) -> Views:
    heights, widths = np.atleast_1d(heights), np.atleast_1d(widths)
    return geometry.views(seed, epoch, np.arange(len(heights)), heights, widths, size, 0.1)


def many(geometry: Geometry, height: int, width: int, **options: int) -> Views:
    return views(geometry, np.full(MANY, height), np.full(MANY, width), **options)


# --- The interface


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=repr)
def test_views_lie_inside_their_images(geometry: Geometry) -> None:
    rng = np.random.default_rng(0)
    heights, widths = rng.integers(1, 3000, (2, 2000))
    found = views(geometry, heights, widths)
    count = 2000 * geometry.crops
    assert [column.shape for column in found.arrays[:3]] == [(count, 4), (count,), (count, 3)]
    assert [column.dtype for column in found.arrays[:3]] == [np.float64, np.bool_, np.float32]
    if found.shift is not None:
        assert found.shift.shape == (count, 2)
        assert found.shift.dtype == np.int64
    tops, lefts, bottoms, rights = found.windows.T
    assert (tops >= 0).all()
    assert (lefts >= 0).all()
    assert (bottoms <= heights.repeat(geometry.crops)).all()
    assert (rights <= widths.repeat(geometry.crops)).all()
    assert (bottoms > tops).all()
    assert (rights > lefts).all()
    assert geometry.shapes(heights, widths, 224).shape == (2000, 2)
    assert bool(found.alphas.any()) == geometry.random


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=repr)
def test_views_depend_only_on_their_own_sample(geometry: Geometry) -> None:
    heights, widths = np.array([300, 400, 50]), np.array([400, 333, 90])
    together = geometry.views(1, 5, np.array([7, 2**40 - 1, 0]), heights, widths, 224, 0.1)
    alone = geometry.views(1, 5, np.array([2**40 - 1]), heights[1:2], widths[1:2], 224, 0.1)
    place = slice(geometry.crops, 2 * geometry.crops)
    for actual, its in zip(together.arrays, alone.arrays, strict=True):
        assert np.array_equal(actual[place], its)
    other = geometry.views(1, 6, np.array([2**40 - 1]), heights[1:2], widths[1:2], 224, 0.1)
    assert all(np.array_equal(a, b) for a, b in zip(alone.arrays, other.arrays, strict=True)) != geometry.random


def test_geometries_scale_with_the_image_size() -> None:
    assert ScaleJitter().scaled(112, 224) == ScaleJitter(128, 240)
    assert ScaleJitter(36, 68).scaled(16, 32) == ScaleJitter(18, 34)
    assert CentreCrop().scaled(64, 224) == CentreCrop(73)
    assert TenCrop(224).scaled(65, 224) == TenCrop(65)
    assert WholeImage(448, mirrored=True).scaled(112, 224) == WholeImage(224, mirrored=True)
    assert RandomResizedCrop((0.2, 1)).scaled(64, 224) == RandomResizedCrop((0.2, 1))
    assert [PaddedCrop().scaled(size, 32) for size in (64, 24, 2)] == [PaddedCrop(8), PaddedCrop(3), PaddedCrop(0)]
    assert PaddedCrop(31).scaled(4, 32) == PaddedCrop(3)


def test_bad_settings_are_refused_in_one_line() -> None:
    for geometry, words in (
        (ScaleJitter(200, 300), "scale 200 300: needs image size"),
        (ScaleJitter(300, 256), "low <= high"),
        (CentreCrop(200), "at least the image size"),
        (TenCrop(223), "at least the image size"),
        (RandomResizedCrop(area=(0, 1)), "area 0 1"),
        *((MultiCrop(groups), "MultiCrop .* needs groups of") for groups in BAD_GROUPS),
        (RandomResizedCrop(aspect=(2, 1)), "aspect 2 1"),
        (WholeImage(0), "at least 1"),
        (PaddedCrop(-1), "padding -1: needs 0 <= padding"),
        (PaddedCrop(224), r"padding 224: .* < image size \(224\)"),
    ):
        with pytest.raises(UserError, match=words):
            geometry.check(224)
    for geometry in GEOMETRIES:
        geometry.check(224)


def test_choose_geometry() -> None:
    for name, expected in (("jitter", ScaleJitter(37, 69)), ("rrc", RandomResizedCrop()), ("pad", PaddedCrop(4))):
        assert choose_geometry(name, None, 32) == expected
    assert choose_geometry("jitter", (40, 50), 32) == ScaleJitter(40, 50)
    for name in ("rrc", "pad"):
        with pytest.raises(UserError, match="`scale` belongs to `geometry` jitter"):
            choose_geometry(name, (40, 50), 32)


# --- Scale jitter and centre crop. Their draws are tested in test_sampling.py.


def test_scale_jitter_uses_the_plans_draws() -> None:
    heights, widths = np.array([300, 400]), np.array([400, 333])
    drawn = sampling.draw(1, 0, [0, 1], heights, widths)
    found = views(ScaleJitter(), heights, widths)
    assert np.array_equal(found.windows, sampling.windows(drawn, heights, widths, 224))
    assert np.array_equal(found.flip, drawn.flip)
    assert np.array_equal(found.alphas, drawn.alphas)


# --- Random resized crops


def published(area: float, aspect: float, height: int, width: int) -> tuple[int, int] | None:
    """Height and width of one attempt of torchvision's RandomResizedCrop.get_params, if it fits."""
    w = round(math.sqrt(height * width * area * aspect))
    h = round(math.sqrt(height * width * area / aspect))
    return (h, w) if 0 < w <= width and 0 < h <= height else None


def fallback(height: int, width: int) -> tuple[int, int]:
    ratio = width / height
    if ratio < min(ASPECT):
        return round(width / min(ASPECT)), width
    if ratio > max(ASPECT):
        return height, round(height * max(ASPECT))
    return height, width


def published_crops(height: int, width: int, count: int) -> npt.NDArray[np.int64]:
    """torchvision's algorithm with NumPy's generator: top, left, bottom, right."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        for _ in range(10):
            size = published(rng.uniform(*AREA), math.exp(rng.uniform(*np.log(ASPECT))), height, width)
            if size:
                top, left = (int(rng.integers(0, room + 1)) for room in (height - size[0], width - size[1]))
                break
        else:
            size = fallback(height, width)
            top, left = (height - size[0]) // 2, (width - size[1]) // 2
        found.append((top, left, top + size[0], left + size[1]))
    return np.array(found)


def test_random_resized_crops_follow_torchvisions_algorithm() -> None:
    """Each sample equals a transcription of the algorithm in Python, with the same random words."""
    heights, widths = np.random.default_rng(0).integers(1, 600, (2, 500))
    heights[:50], widths[:50] = 10, 400  # attempts fail
    found = views(RandomResizedCrop(), heights, widths, seed=9, epoch=4).windows
    key = np.uint64(9)
    for sample, (height, width) in enumerate(zip(heights.tolist(), widths.tolist(), strict=True)):
        for attempt in range(10):
            counter = (np.uint64(word) for word in (sample, 0, 4, 16 + attempt))
            u = [int(word) / 2**32 for word in random.philox(key, *counter)]
            area = AREA[0] + u[0] * (AREA[1] - AREA[0])
            low, high = math.log(ASPECT[0]), math.log(ASPECT[1])
            size = published(area, math.exp(low + u[1] * (high - low)), height, width)
            if size:
                top, left = int(u[2] * (height - size[0] + 1)), int(u[3] * (width - size[1] + 1))
                break
        else:
            size = fallback(height, width)
            top, left = (height - size[0]) // 2, (width - size[1]) // 2
        assert found[sample].tolist() == [top, left, top + size[0], left + size[1]], sample


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (300, 300), (100, 500)])
def test_random_resized_crops_are_distributed_as_in_torchvision(height: int, width: int) -> None:
    actual, reference = many(RandomResizedCrop(), height, width).windows, published_crops(height, width, MANY // 4)
    for figure in (area_of, aspect_of, lambda crops: crops[:, 0], lambda crops: crops[:, 1]):
        assert ks_2samp(figure(actual), figure(reference)).pvalue > 1e-4


def test_areas_and_aspects_are_uniform_where_every_attempt_fits() -> None:
    """For areas below a half in a square image, every attempt fits, so areas and aspects are uniform on their ranges."""
    crops = many(RandomResizedCrop(area=(0.08, 0.5)), 4000, 4000).windows
    assert kstest(area_of(crops) / 4000**2, "uniform", (0.08, 0.42)).pvalue > 1e-3
    low, high = np.log(ASPECT)
    assert kstest(np.log(aspect_of(crops)), "uniform", (low, high - low)).pvalue > 1e-3


def area_of(crops: npt.NDArray[Any]) -> npt.NDArray[Any]:
    area: npt.NDArray[Any] = (crops[:, 2] - crops[:, 0]) * (crops[:, 3] - crops[:, 1])
    return area


def aspect_of(crops: npt.NDArray[Any]) -> npt.NDArray[Any]:
    aspect: npt.NDArray[Any] = (crops[:, 3] - crops[:, 1]) / (crops[:, 2] - crops[:, 0])
    return aspect


def test_random_resized_crops_flip_half_the_time_independently_of_the_crop() -> None:
    found = many(RandomResizedCrop(), 375, 500)
    assert abs(int(found.flip.sum()) - MANY / 2) < 5 * math.sqrt(MANY / 4)
    for column in (*found.windows.T, *found.alphas.T):
        assert abs(np.corrcoef(column, found.flip)[0, 1]) < 4.5 / math.sqrt(MANY)


def test_random_resized_crops_of_neighbouring_keys_are_unrelated() -> None:
    first = many(RandomResizedCrop(), 375, 500)
    for other in (many(RandomResizedCrop(), 375, 500, epoch=1), many(RandomResizedCrop(), 375, 500, seed=2)):
        for actual, reference in zip(first.windows.T, other.windows.T, strict=True):
            assert abs(np.corrcoef(actual, reference)[0, 1]) < 4.5 / math.sqrt(MANY)
    for column in first.windows.T:
        assert abs(np.corrcoef(column[:-1], column[1:])[0, 1]) < 4.5 / math.sqrt(MANY)


def test_random_resized_crops_golden_values() -> None:
    """A change of these values changes every user's epochs and needs a new major version."""
    found, flip = sampling.resized_crops(2**63 + 5, 89, [0, 1, 2**40 - 1], [375, 500, 100], [500, 333, 3000], AREA, ASPECT)
    assert found.tolist() == GOLDEN_WINDOWS
    assert flip.tolist() == GOLDEN_FLIPS


# --- Several views

GROUPS = ((224, 2, (0.3, 1.0)), (96, 2, (0.05, 0.3)))


def view_of(found: Views, number: int) -> list[npt.NDArray[Any]]:
    """The windows, flips and alphas of a view of all images. found: of a geometry with four views."""
    return [column[number::4] for column in found.arrays]


def test_the_draws_of_a_view_depend_on_its_number_and_area_alone() -> None:
    heights, widths = np.full(500, 375), np.full(500, 500)
    four = views(MultiCrop(GROUPS), heights, widths)
    alone = views(RandomResizedCrop(GROUPS[0][2]), heights, widths)
    large = views(MultiCrop(GROUPS[:1]), heights, widths)
    for actual, first, second, reference in zip(view_of(four, 0), alone.arrays, view_of(four, 1), large.arrays, strict=True):
        assert np.array_equal(actual, first)
        assert np.array_equal(reference[::2], actual)
        assert np.array_equal(reference[1::2], second)


@pytest.mark.parametrize(("number", "area"), [(0, (0.3, 1.0)), (1, (0.3, 1.0)), (2, (0.05, 0.3)), (3, (0.05, 0.3))])
def test_each_view_has_draws_of_its_own_within_its_groups_area(number: int, area: tuple[float, float]) -> None:
    found = many(MultiCrop(GROUPS), 1000, 1000)
    windows, flip, alphas = view_of(found, number)
    share = (windows[:, 2:] - windows[:, :2]).prod(axis=1) / 1000**2
    assert area[0] - 0.002 < share.min() < area[0] + 0.01
    assert share.max() < area[1] + 0.002
    assert abs(flip.mean() - 0.5) < 0.015
    columns = np.column_stack([windows[:, 0], share, flip, alphas])
    for other in set(range(4)) - {number}:
        its, mirrored, lit = view_of(found, other)
        shares = (its[:, 2:] - its[:, :2]).prod(axis=1)
        for column, reference in zip(columns.T, np.column_stack([its[:, 0], shares, mirrored, lit]).T, strict=True):
            assert abs(np.corrcoef(column, reference)[0, 1]) < 4.5 / math.sqrt(MANY)


def test_several_views_golden_values() -> None:
    """A change of these values changes every user's epochs and needs a new major version."""
    found = MultiCrop(GROUPS).views(2**63 + 5, 89, np.array([0, 2**40 - 1]), np.array([375, 500]), np.array([500, 333]), 224, 0.1)
    assert found.windows.tolist() == [
        [5, 88, 363, 419], [61, 89, 372, 448], [43, 152, 202, 343], [13, 62, 248, 265],
        [120, 13, 363, 327], [93, 3, 437, 267], [22, 65, 150, 170], [249, 125, 413, 279],
    ]  # fmt: skip
    assert found.flip.tolist() == [True, False, True, True, False, False, True, False]
    assert found.alphas[1] == pytest.approx([-0.0078218197, 0.0562108345, 0.1479354948])


# --- Padded crops


def positions(found: Views, short: int, size: int) -> npt.NDArray[np.float64]:
    """The crops' corners in the resized image, (V, 2), from the position of the window and the shift of the view.

    short: the short side of the images, which is resized to `size`.
    """
    assert found.shift is not None
    across = np.where(found.flip, -1, 1)
    corners: npt.NDArray[np.float64] = found.windows[:, :2] * size / short - found.shift * np.stack([across**2, across], axis=1)
    return corners


def test_padded_crops_are_at_the_drawn_positions() -> None:
    """80 x 64, 64 x 64 and 64 x 160, resized to short side 32: a resized pixel is two source pixels."""
    heights, widths = np.tile([80, 64, 64], 2000), np.tile([64, 64, 160], 2000)
    found = views(PaddedCrop(4), heights, widths, 32)
    drawn = sampling.draw(1, 0, np.arange(6000), heights, widths, (32, 32), 32, padding=4)
    assert np.array_equal(positions(found, 64, 32), np.stack([drawn.top, drawn.left], axis=1))
    assert np.array_equal(found.flip, drawn.flip)
    assert np.array_equal(found.alphas, drawn.alphas)
    assert np.allclose(found.windows[:, 2:] - found.windows[:, :2], 64)
    assert found.shift is not None
    moved = np.abs(found.shift) > 0
    assert (np.abs(found.shift) <= 4).all()
    ends = np.stack([heights, widths], axis=1)
    assert (moved <= ((found.windows[:, :2] == 0) | (found.windows[:, 2:] == ends))).all()  # only at the image's border


@pytest.mark.parametrize(("height", "width", "places"), [(32, 32, (9, 9)), (96, 64, (25, 9)), (48, 72, (9, 25))])
def test_padded_crops_are_uniform_over_every_position(height: int, width: int, places: tuple[int, int]) -> None:
    corners = positions(many(PaddedCrop(4), height, width, size=32), min(height, width), 32).round().astype(int) + 4
    for axis in range(2):
        counts = np.bincount(corners[:, axis])
        assert len(counts) == places[axis]
        assert chisquare(counts).pvalue > 1e-4
    both = np.bincount(corners[:, 0] * places[1] + corners[:, 1], minlength=places[0] * places[1])
    assert chisquare(both).pvalue > 1e-4


def test_padded_crops_flip_half_the_time_independently_of_the_crop() -> None:
    found = many(PaddedCrop(4), 32, 32, size=32)
    assert abs(int(found.flip.sum()) - MANY / 2) < 5 * math.sqrt(MANY / 4)
    for column in (*positions(found, 32, 32).T, *found.alphas.T):
        assert abs(np.corrcoef(column, found.flip)[0, 1]) < 4.5 / math.sqrt(MANY)


def test_the_amount_of_visible_padding() -> None:
    """Along each axis, 0 to 4 of 32 pixels are zero, 20/9 on average. The axes are independent."""
    found = many(PaddedCrop(4), 32, 32, size=32)
    assert found.shift is not None
    black = (translate(np.full((MANY, 32, 32, 3), 255, np.uint8), found.shift) == 0).mean(axis=(1, 2, 3))
    expected = 1 - (1 - 20 / 9 / 32) ** 2
    assert abs(black.mean() - expected) < 5 * black.std() / math.sqrt(MANY)


def test_without_padding_there_is_no_shift() -> None:
    found = many(PaddedCrop(0), 48, 32, size=32)
    jittered = many(ScaleJitter(32, 32), 48, 32, size=32)
    assert not np.any(found.shift)
    assert all(np.array_equal(a, b) for a, b in zip(found.arrays[:3], jittered.arrays, strict=True))


# --- Testing schemes


def test_ten_crops_are_at_torchvisions_positions() -> None:
    """300 x 400, resized to short side 150: a resized pixel is two source pixels."""
    found = views(TenCrop(150), [300, 600], [400, 450], 100)
    five = [(0, 0), (0, 100), (50, 0), (50, 100), (25, 50)]  # corners of 100 x 100 in 150 x 200
    expected = [(2 * top, 2 * left, 2 * top + 200, 2 * left + 200) for top, left in five]
    assert found.windows[:10].tolist() == pytest.approx(np.array(expected * 2))
    assert found.flip[:10].tolist() == [False] * 5 + [True] * 5
    five = [(0, 0), (0, 50), (100, 0), (100, 50), (50, 25)]  # in 200 x 150, where a resized pixel is three source pixels
    expected = [(3 * top, 3 * left, 3 * top + 300, 3 * left + 300) for top, left in five]
    assert found.windows[10:].tolist() == pytest.approx(np.array(expected * 2))


def test_the_fifth_of_ten_crops_is_the_central_one() -> None:
    heights, widths = np.array([375, 500, 31]), np.array([500, 333, 40])
    assert np.array_equal(views(TenCrop(), heights, widths).windows[4::10], views(CentreCrop(), heights, widths).windows)


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize(("height", "width"), [(333, 271), (299, 467), (375, 500), (60, 41), (40, 640)])
def test_the_crop_of_torchvision_is_that_of_the_whole_image_resized_by_pillow(height: int, width: int, square: bool) -> None:
    """torchvision.transforms: Resize(72) gives int(72 * long / short) pixels for the long side, CenterCrop(65) rounds half to
    even."""
    image = Image.fromarray(random_image(height, width))
    short = min(height, width)
    sides = (72, 72) if square else (int(72 * width / short), int(72 * height / short))
    left, top = (round((side - 65) / 2.0) for side in sides)
    expected = np.asarray(image.resize(sides, Image.Resampling.BILINEAR))[top : top + 65, left : left + 65]
    (low_y, low_x, high_y, high_x), *_ = views(TorchvisionCrop(72, square=square), height, width, 65).windows
    found = np.asarray(image.resize((65, 65), Image.Resampling.BILINEAR, box=(low_x, low_y, high_x, high_y)))
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_whole_images_keep_their_aspect_ratio() -> None:
    heights, widths = np.array([300, 500, 10]), np.array([400, 333, 160])
    assert WholeImage(256).shapes(heights, widths, 224).tolist() == [[256, 341], [384, 256], [256, 4096]]
    found = views(WholeImage(256, mirrored=True), heights, widths)
    assert found.windows.tolist() == [[0, 0, h, w] for h, w in zip(heights, widths, strict=True) for _ in range(2)]
    assert found.flip.tolist() == [False, True] * 3


def test_of_extremely_long_images_the_central_part_is_taken() -> None:
    """Resized whole, the first one would have 640 x 13,973,333 pixels."""
    heights, widths = np.array([3, 65500, 10]), np.array([65500, 3, 161])
    assert WholeImage(640).shapes(heights, widths, 224).tolist() == [[640, 10240], [10240, 640], [640, 10240]]
    found = views(WholeImage(640), heights, widths)
    assert found.windows.tolist() == [[0, 32726, 3, 32774], [32726, 0, 32774, 3], [0, 0.5, 10, 160.5]]
