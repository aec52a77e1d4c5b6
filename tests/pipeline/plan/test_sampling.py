from __future__ import annotations

import math
import tracemalloc
from collections import Counter
from typing import Any

import numpy as np
import pytest

from pipeline.plan import random, sampling

GOLDEN_ORDER_10 = [5, 9, 3, 4, 8, 1, 7, 6, 0, 2]
GOLDEN_ORDER_IMAGENET = [375850, 1060278, 1136484]
GOLDEN_ORDER_LARGE = [979473837969, 713570381973, 589910531554]
GOLDEN_DRAW: dict[str, list[Any]] = {
    "short": [280, 391, 391],
    "top": [19, 231, 63],
    "left": [41, 43, 5388],
    "flip": [False, True, True],
    "alphas": [
        [0.0672346056, -0.149568066, -0.137406871],
        [-0.0960285962, 0.166427374, -0.00988524966],
        [-0.0500361174, -0.069876723, 0.119355239],
    ],
}

GOLDEN_PADDED = {"top": [-1, 1, -1], "left": [-2, -2, 12]}
GOLDEN_SUBSTITUTES = [85503524845, 1023384016225]

MANY = 225 * 1000


def chi_square_is_ordinary(counts: np.ndarray, expected: float) -> bool:
    """Whether the statistic of counts of equally likely cells lies within five standard deviations of its mean."""
    degrees = len(counts) - 1
    statistic = float(((counts - expected) ** 2).sum() / expected)
    return abs(statistic - degrees) < 5 * math.sqrt(2 * degrees)


def uncorrelated(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether Pearson's r lies within 4.5 standard deviations of zero."""
    return abs(float(np.corrcoef(a.astype(float), b.astype(float))[0, 1])) < 4.5 / math.sqrt(len(a))


def draw_many(
    count: int, seed: int = 1, epoch: int = 0, height: int = 375, width: int = 500, **options: object
) -> sampling.Draws:
    return sampling.draw(seed, epoch, np.arange(count), np.full(count, height), np.full(count, width), **options)  # type: ignore[arg-type]


# --- Philox


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [  # Random123's kat_vectors, philox4x32 with 10 rounds
        (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (2**64 - 1, (2**32 - 1,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (0x299F31D0A4093822, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
)
def test_philox_known_answers(key: int, counter: tuple[int, ...], expected: tuple[int, ...]) -> None:
    words = random.philox(np.uint64(key), *(np.uint64(word) for word in counter))
    assert tuple(int(word) for word in words) == expected


# --- order


@pytest.mark.parametrize("n", [1, 2, 3, 7, 255, 256, 257, 1000, 65_537])
def test_order_is_a_permutation(n: int) -> None:
    for seed, epoch in ((0, 0), (1, 0), (2**64 - 1, 2**32 - 1)):
        assert np.array_equal(np.sort(sampling.order(seed, epoch, np.arange(n), n)), np.arange(n))


@pytest.mark.parametrize("n", [3, 4, 5])
def test_every_permutation_is_equally_likely(n: int) -> None:
    keys = 24_000
    seen = Counter(tuple(sampling.order(key // 120, key % 120, np.arange(n), n)) for key in range(keys))
    cells = math.factorial(n)
    counts = np.array([*seen.values(), *[0] * (cells - len(seen))])
    assert chi_square_is_ordinary(counts, keys / cells)


def test_every_sample_is_equally_likely_at_a_position() -> None:
    n, keys = 100, 20_000
    counts = np.bincount([sampling.order(7, epoch, [42], n)[0] for epoch in range(keys)], minlength=n)
    assert chi_square_is_ordinary(counts, keys / n)


@pytest.mark.parametrize("other", [(1, 1), (2, 0), (1, 2), (1 << 32, 0)])
def test_orders_of_neighbouring_keys_are_unrelated(other: tuple[int, int]) -> None:
    n = 50_000
    first, second = sampling.order(1, 0, np.arange(n), n), sampling.order(*other, np.arange(n), n)
    assert uncorrelated(first, second)
    assert uncorrelated(first, np.arange(n))
    assert uncorrelated(first[:-1], first[1:])
    assert (first == second).sum() < 8  # Poisson with mean 1


def test_order_is_evaluated_point_by_point_in_constant_memory() -> None:
    n = sampling.MAX_SAMPLES
    positions = np.random.default_rng(0).integers(0, n, 20_000)
    together = sampling.order(3, 5, positions, n)
    assert together.min() >= 0
    assert together.max() < n
    assert len(np.unique(together)) == len(np.unique(positions))
    assert [sampling.order(3, 5, [position], n)[0] for position in positions[:50]] == together[:50].tolist()
    tracemalloc.start()
    sampling.order(3, 5, positions[:10], n)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


def test_order_golden_values() -> None:
    """Any change here changes every user's epochs: it needs a new major version."""
    assert sampling.order(0, 0, np.arange(10), 10).tolist() == GOLDEN_ORDER_10
    assert sampling.order(2**63 + 5, 89, [0, 1, 1_281_166], 1_281_167).tolist() == GOLDEN_ORDER_IMAGENET
    assert sampling.order(7, 3, [0, 1, 2**40 - 1], 2**40).tolist() == GOLDEN_ORDER_LARGE


@pytest.mark.parametrize(
    ("seed", "epoch", "positions", "n"),
    [
        (-1, 0, [0], 5),
        (2**64, 0, [0], 5),
        (0, -1, [0], 5),
        (0, 2**32, [0], 5),
        (0, 0, [5], 5),
        (0, 0, [-1], 5),
        (0, 0, [0], 0),
        (0, 0, [0], 2**40 + 1),
    ],
)
def test_order_refuses_bad_arguments(seed: int, epoch: int, positions: list[int], n: int) -> None:
    with pytest.raises(ValueError, match="must"):
        sampling.order(seed, epoch, positions, n)


# --- draw


def test_short_side_is_uniform() -> None:
    counts = np.bincount(draw_many(MANY).short - 256)
    assert len(counts) == 225  # 256..480, both ends included
    assert chi_square_is_ordinary(counts, MANY / 225)


@pytest.mark.parametrize("axis", ["top", "left"])
def test_corner_is_uniform_over_every_position(axis: str) -> None:
    drawn = draw_many(MANY, height=300, width=300, scale=(256, 256))
    counts = np.bincount(getattr(drawn, axis))
    assert len(counts) == 256 - 224 + 1
    assert chi_square_is_ordinary(counts, MANY / 33)


@pytest.mark.parametrize("axis", ["top", "left"])
@pytest.mark.parametrize(("width", "long"), [(300, 32), (450, 48)])
def test_corner_is_uniform_over_every_place_of_the_padded_image(axis: str, width: int, long: int) -> None:
    drawn = draw_many(MANY, height=300, width=width, scale=(32, 32), crop=32, padding=4)
    places = 1 + 2 * 4 + (long - 32 if axis == "left" else 0)
    counts = np.bincount(getattr(drawn, axis) + 4)
    assert len(counts) == places
    assert chi_square_is_ordinary(counts, MANY / places)


def test_padding_changes_only_the_corner() -> None:
    plain, padded = draw_many(1000), draw_many(1000, padding=28)
    same = [np.array_equal(a, b) for a, b in zip(columns(plain), columns(padded), strict=True)]
    assert same == [True, False, False, True, True, True, True]


def test_corner_reaches_the_ends_of_the_long_side() -> None:
    drawn = draw_many(MANY, height=300, width=450, scale=(300, 300))
    assert drawn.left.min() == 0
    assert drawn.left.max() == 450 - 224
    assert drawn.top.max() == 300 - 224


def test_flip_is_a_fair_coin() -> None:
    flips = int(draw_many(MANY).flip.sum())
    assert abs(flips - MANY / 2) < 5 * math.sqrt(MANY / 4)


@pytest.mark.parametrize("component", [0, 1, 2])
def test_alphas_are_normal(component: int) -> None:
    """Pools eight keys. Of single keys, a few in a thousand exceed the limit, as expected."""
    drawn = [draw_many(MANY // 8, seed=seed, epoch=seed % 3).alphas[:, component] for seed in range(8)]
    alphas = np.sort(np.concatenate(drawn).astype(float)) / 0.1
    cdf = np.array([0.5 * (1 + math.erf(x / math.sqrt(2))) for x in alphas])
    steps = np.arange(len(alphas) + 1) / len(alphas)
    distance = max(np.abs(cdf - steps[1:]).max(), np.abs(cdf - steps[:-1]).max())
    assert distance * math.sqrt(MANY) < 1.95  # Kolmogorov-Smirnov, p = 0.001
    assert abs(alphas.mean()) < 5 / math.sqrt(MANY)
    assert abs(alphas.std() - 1) < 5 / math.sqrt(2 * MANY)


def columns(drawn: sampling.Draws) -> list[np.ndarray]:
    return [drawn.short, drawn.top, drawn.left, drawn.flip, *drawn.alphas.T]


def test_draws_of_one_sample_are_independent() -> None:
    drawn = columns(draw_many(MANY, height=300, width=300, scale=(400, 400)))[1:]  # at one S, on which the corner's range depends
    for i, first in enumerate(drawn):
        for second in drawn[i + 1 :]:
            assert uncorrelated(first, second)
            if first.dtype != bool and second.dtype != bool:
                assert uncorrelated(np.abs(first - first.mean()), np.abs(second - second.mean()))


@pytest.mark.parametrize("other", [{"epoch": 1}, {"seed": 2}, {"seed": 1 + (1 << 32)}, {"epoch": 1 << 16}])
def test_draws_of_neighbouring_keys_are_unrelated(other: dict[str, int]) -> None:
    for first, second in zip(columns(draw_many(MANY)), columns(draw_many(MANY, **other)), strict=True):
        assert uncorrelated(first, second)


def test_draws_of_neighbouring_samples_are_unrelated() -> None:
    for column in columns(draw_many(MANY)):
        assert uncorrelated(column[:-1], column[1:])


def test_draws_depend_only_on_their_own_sample() -> None:
    every = draw_many(1000)
    some = sampling.draw(1, 0, [7, 999, 0], [375] * 3, [500] * 3)
    for all_of, three in zip(columns(every), columns(some), strict=True):
        assert np.array_equal(all_of[[7, 999, 0]], three)


def test_draw_golden_values() -> None:
    """Any change here changes every user's epochs: it needs a new major version."""
    drawn = sampling.draw(2**63 + 5, 89, [0, 1, 2**40 - 1], [375, 500, 100], [500, 333, 3000])
    assert drawn.short.tolist() == GOLDEN_DRAW["short"]
    assert drawn.top.tolist() == GOLDEN_DRAW["top"]
    assert drawn.left.tolist() == GOLDEN_DRAW["left"]
    assert drawn.flip.tolist() == GOLDEN_DRAW["flip"]
    assert drawn.alphas.tolist() == np.array(GOLDEN_DRAW["alphas"], np.float32).tolist()


def test_padded_draw_golden_values() -> None:
    """Any change here changes every user's epochs: it needs a new major version."""
    drawn = sampling.draw(2**63 + 5, 89, [0, 1, 2**40 - 1], [32, 32, 50], [32, 32, 91], (32, 32), 32, padding=4)
    assert drawn.short.tolist() == [32] * 3
    assert drawn.top.tolist() == GOLDEN_PADDED["top"]
    assert drawn.left.tolist() == GOLDEN_PADDED["left"]
    assert drawn.flip.tolist() == GOLDEN_DRAW["flip"]
    assert drawn.alphas.tolist() == np.array(GOLDEN_DRAW["alphas"], np.float32).tolist()


def test_draw_refuses_bad_arguments() -> None:
    for bad in ({"scale": (200, 300)}, {"scale": (300, 256)}, {"crop": 0}):
        with pytest.raises(ValueError, match="scale must satisfy"):
            draw_many(2, **bad)
    for padding in (-1, 224):
        with pytest.raises(ValueError, match="padding must satisfy"):
            draw_many(2, padding=padding)
    with pytest.raises(ValueError, match="positive"):
        draw_many(2, height=0)
    with pytest.raises(ValueError, match="one for each"):
        sampling.draw(0, 0, [0, 1], [10], [10])
    with pytest.raises(ValueError, match="samples"):
        sampling.draw(0, 0, [-1], [10], [10])


# --- geometry


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 4000), (375, 500), (500, 375), (224, 224), (3000, 2001), (31, 33)])
def test_crops_lie_inside(height: int, width: int) -> None:
    drawn = draw_many(5000, height=height, width=width)
    sizes = np.full(5000, height), np.full(5000, width)
    out_height, out_width = sampling.resized(*sizes, drawn.short)
    assert (np.minimum(out_height, out_width) == drawn.short).all()
    for corner, side in ((drawn.top, out_height), (drawn.left, out_width)):
        assert (corner >= 0).all()
        assert (corner + 224 <= side).all()
    windows = sampling.windows(drawn, *sizes, 224)
    assert (windows[:, :2] >= 0).all()
    assert (windows[:, 2] <= height).all()
    assert (windows[:, 3] <= width).all()
    assert (windows[:, 2:] > windows[:, :2]).all()


def test_resized_is_the_rounded_formula() -> None:
    from fractions import Fraction

    for height, width, short in ((375, 500, 256), (333, 500, 301), (1, 4000, 256), (3, 2, 3), (997, 1009, 479)):
        expected = [math.floor(Fraction(side * short, min(height, width)) + Fraction(1, 2)) for side in (height, width)]
        found = sampling.resized([height], [width], [short])
        assert [int(axis[0]) for axis in found] == expected


def test_windows_of_an_exact_resize() -> None:
    """400 x 300, resized to short side 150: a resized pixel is two source pixels, so windows are twice as large as crops."""
    drawn = draw_many(100, height=300, width=400, scale=(150, 150), crop=100)
    expected = np.stack([drawn.top, drawn.left, drawn.top + 100, drawn.left + 100], axis=1) * 2.0
    assert np.allclose(sampling.windows(drawn, np.full(100, 300), np.full(100, 400), 100), expected)


def test_centre() -> None:
    drawn = sampling.centre([300, 400, 256], [400, 300, 257], 256, 224)
    assert drawn.short.tolist() == [256] * 3
    assert drawn.top.tolist() == [16, (341 - 224) // 2, 16]
    assert drawn.left.tolist() == [(341 - 224) // 2, 16, 16]
    assert not drawn.flip.any()
    assert not drawn.alphas.any()
    with pytest.raises(ValueError, match="at least the crop"):
        sampling.centre([300], [300], 200, 224)


# --- ranks


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8, 13])
def test_rank_ranges_tile_the_global_batch(world_size: int) -> None:
    for start, stop in ((0, 256), (512, 519), (7, 8), (3, 3)):
        parts = [sampling.rank_range(start, stop, rank, world_size) for rank in range(world_size)]
        covered = [position for low, high in parts for position in range(low, high)]
        assert covered == list(range(start, stop))
        sizes = [high - low for low, high in parts]
        assert max(sizes) - min(sizes) <= 1
    with pytest.raises(ValueError, match="rank"):
        sampling.rank_range(0, 10, world_size, world_size)


# --- Regions


def test_regions_contain_the_filters_support_on_each_axis() -> None:
    windows = np.array([[100.5, 200.5, 300.5, 250.5], [0.0, 0.0, 50.0, 50.0]])
    heights, widths = np.array([400, 50]), np.array([400, 50])
    found = sampling.regions(windows, heights, widths, (50, 100))  # heights are reduced fourfold, widths enlarged
    assert found.tolist() == [[95, 198, 306, 253], [0, 0, 50, 50]]
    bicubic = sampling.regions(windows, heights, widths, (50, 100), support=2)
    assert bicubic.tolist() == [[91, 197, 310, 254], [0, 0, 50, 50]]
    assert np.array_equal(sampling.regions(windows, heights, widths, 50), sampling.regions(windows, heights, widths, (50, 50)))


def test_short_sides_scale_with_the_size_and_are_at_least_the_size() -> None:
    assert [sampling.short_at(256, size) for size in (224, 112, 56, 64)] == [256, 128, 64, 73]
    assert sampling.short_at(36, 16, nominal=32) == 18
    assert sampling.short_at(224, 3, nominal=225) == 3


# --- Substitutes


def test_substitutes_are_uniform_on_the_other_samples() -> None:
    n, keys = 20, 20_000
    counts = np.bincount([sampling.substitute(key, 3, 7, key % 32, n) for key in range(keys)], minlength=n)
    assert counts[7] == 0
    assert chi_square_is_ordinary(np.delete(counts, 7), keys / (n - 1))


def test_substitutes_of_neighbours_are_unrelated() -> None:
    n = 10_000
    base = np.array([sampling.substitute(1, 0, sample, 0, n) for sample in range(n)])
    for other in ((1, 0, 1), (1, 1, 0), (2, 0, 0)):
        seed, epoch, attempt = other
        found = np.array([sampling.substitute(seed, epoch, sample, attempt, n) for sample in range(n)])
        assert uncorrelated(base, found)
        assert (base == found).sum() < 10


def test_substitute_golden_values() -> None:
    """Any change here changes every user's epochs: it needs a new major version."""
    assert [sampling.substitute(2**63 + 5, 89, 2**40 - 1, attempt, 2**40) for attempt in (0, 31)] == GOLDEN_SUBSTITUTES
    assert {sampling.substitute(0, epoch, sample, 0, 2) for epoch in range(9) for sample in (1,)} == {0}
    for sample, attempt, n in ((0, 0, 1), (5, 0, 5), (-1, 0, 5), (0, 32, 5), (0, -1, 5)):
        with pytest.raises(ValueError, match="must"):
            sampling.substitute(0, 0, sample, attempt, n)
