"""Orders are permutations that can be computed at any position. Measures how well blocks shuffle."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import spearmanr

from pipeline.plan import order as orders
from pipeline.plan import sampling
from pipeline.plan.order import Blocks, ByShape, Full, Order, Sequential
from pipeline.store.shards import ShardSet

SIZES = (5, 1, 7, 3, 3, 9, 2)  # of shards, 30 samples
GOLDEN_BLOCKS = [28, 29, 12, 10, 6, 8, 9, 7, 11, 5, 19, 16, 13, 15, 25]

Ints = npt.NDArray[np.int64]


def whole(order: Order, epoch: int = 0) -> Ints:
    return order.samples(epoch, np.arange(order.count))


@pytest.mark.parametrize("sizes", [SIZES, (1,), (4,), (1, 1, 1), (1000, 1000, 17)])
@pytest.mark.parametrize("per_block", [1, 2, 3, 7, 100])
def test_blocks_are_permutations(sizes: tuple[int, ...], per_block: int) -> None:
    for seed, epoch in ((0, 0), (1, 0), (2**64 - 1, 2**32 - 1)):
        order = Blocks(sizes, seed, per_block)
        assert np.array_equal(np.sort(whole(order, epoch)), np.arange(sum(sizes)))


@pytest.mark.parametrize("per_block", [1, 2, 3, 7])
def test_a_block_holds_its_shards_and_nothing_else(per_block: int) -> None:
    order = Blocks(SIZES, 3, per_block)
    shard_of = np.repeat(np.arange(len(SIZES)), SIZES)
    for epoch in range(5):
        samples = whole(order, epoch)
        blocks = np.array([order.block(epoch, position) for position in range(order.count)])
        assert (np.diff(blocks) >= 0).all()
        assert blocks[-1] == order.blocks - 1
        seen = [order.shards(epoch, block) for block in range(order.blocks)]
        assert sorted(shard for shards in seen for shard in shards) == list(range(len(SIZES)))
        for block, shards in enumerate(seen):
            assert len(shards) == per_block or block == order.blocks - 1
            assert set(shard_of[samples[blocks == block]]) == set(shards)


def test_positions_can_be_evaluated_alone_and_in_any_order() -> None:
    together = whole(Blocks(SIZES, 3, 2), 4)
    alone = Blocks(SIZES, 3, 2)
    for position in np.random.default_rng(0).permutation(30).tolist():
        alone.samples(position % 3, np.array([position]))  # other epochs in between
        assert alone.samples(4, np.array([position])) == together[position]
    assert alone.samples(4, np.array([29, 3, 3, 0])).tolist() == together[[29, 3, 3, 0]].tolist()
    assert len(alone._epochs) <= 2


def test_blocks_golden_values() -> None:
    """A change of these values changes every user's epochs and needs a new major version."""
    assert whole(Blocks(SIZES, 2**63 + 5, 3), 89)[:15].tolist() == GOLDEN_BLOCKS


def test_within_a_block_every_sample_is_equally_likely_at_every_position() -> None:
    """One block contains all shards. Chi-square of the samples at two positions, over many epochs."""
    order, keys = Blocks((10, 10, 10), 7, 3), 6000
    for position in (0, 17):
        counts = np.bincount([order.samples(epoch, np.array([position]))[0] for epoch in range(keys)], minlength=30)
        statistic = ((counts - keys / 30) ** 2).sum() / (keys / 30)
        assert abs(statistic - 29) < 5 * np.sqrt(2 * 29)


def test_epochs_blocks_and_seeds_are_unrelated() -> None:
    sizes = [500] * 20
    first = whole(Blocks(sizes, 1, 4), 0)
    for other in (whole(Blocks(sizes, 1, 4), 1), whole(Blocks(sizes, 2, 4), 0), whole(Full(10_000, 1), 0)):
        assert (first == other).sum() < 10  # Poisson with mean 1
    places = first.reshape(5, 2000) % 500
    for block in range(1, 5):
        assert (places[0] == places[block]).sum() < 20  # Poisson with mean 4


def test_a_billion_samples_need_memory_only_per_shard() -> None:
    sizes = np.full(100_000, 10_000)  # 10^9
    tracemalloc.start()
    order = Blocks(sizes, 0, 8)
    found = order.samples(3, np.arange(123_456_789, 123_456_789 + 256))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(found.tolist())) == 256
    assert peak < 100 * len(sizes)  # bytes: O(shards)


def test_sequential_full_and_by_shape() -> None:
    assert whole(Sequential(5)).tolist() == [0, 1, 2, 3, 4]
    assert whole(Full(10, 3), 2).tolist() == sampling.order(3, 2, np.arange(10), 10).tolist()
    shapes = np.array([[2, 3], [1, 9], [2, 3], [3, 1], [1, 9], [1, 8]])
    by_shape = ByShape(shapes)
    assert whole(by_shape).tolist() == [5, 1, 4, 0, 2, 3]
    assert by_shape.runs().tolist() == [1, 2, 2, 1]


def test_samples_npy_is_ordered_by_shard(small_shards: Path) -> None:
    """`Blocks` relies on this."""
    for split in ("train", "val"):
        shards = ShardSet(small_shards, split)
        assert shards.samples["shard"].tolist() == np.repeat(np.arange(len(shards.sizes)), shards.sizes).tolist()


# --- Shuffling


class Shuffle(NamedTuple):
    """How well an order shuffles. correlation: absolute value of Spearman's, between position and stored position.

    companions: share of a batch's images with another image of their shard in the batch. shards: distinct shards in a batch.
    """

    correlation: float
    companions: float
    shards: float


def measure(order: Order, shard_size: int, batch_size: int, epochs: int) -> Shuffle:
    """Means over epochs and batches, without incomplete batches."""
    figures = []
    for epoch in range(epochs):
        samples = whole(order, epoch)
        batches = np.sort((samples // shard_size)[: order.count // batch_size * batch_size].reshape(-1, batch_size))
        same = batches[:, 1:] == batches[:, :-1]
        companions = np.pad(same, ((0, 0), (0, 1))) | np.pad(same, ((0, 0), (1, 0)))
        correlation = abs(float(spearmanr(np.arange(order.count), samples).statistic))
        figures.append((correlation, companions.mean(), batch_size - same.sum(axis=1).mean()))
    return Shuffle(*np.mean(figures, axis=0).tolist())


def test_blocks_shuffle_as_documented() -> None:
    """The figures in Blocks' docstring, on a tenth of ImageNet: 128 shards of 1,000."""
    found = {k: measure(Blocks([1000] * 128, 0, k), 1000, 256, 3) for k in (1, 8, 32)}
    full = measure(Full(128_000, 0), 1000, 256, 3)
    assert found[1].shards < 1.5
    assert 7.9 < found[8].shards < 9
    assert 30 < found[32].shards < 33
    assert 105 < full.shards < 115
    assert full.companions < found[32].companions <= found[8].companions <= found[1].companions <= 1
    assert max(figure.correlation for figure in (*found.values(), full)) < 0.25


def test_the_order_does_not_depend_on_the_shards_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    expected = [Blocks(sizes, 7, per_block).samples(2, np.arange(44)).tolist() for per_block in (1, 3, 20)]
    monkeypatch.setattr(orders, "_AT_ONCE", 4)
    assert [Blocks(sizes, 7, per_block).samples(2, np.arange(44)).tolist() for per_block in (1, 3, 20)] == expected
