from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
from scipy.stats import kstest

from training.uniforms import Stream, uniforms


@pytest.mark.parametrize("count", [1, 4, 8, 50])
def test_numbers_depend_on_the_position_and_not_on_the_range(count: int) -> None:
    whole = uniforms(3, Stream.DROP, 7, 0, 1000, count)
    assert whole.shape == (1000, count)
    for low, high in [*pairwise([0, 1, 33, 500, 1000]), (6, 6)]:
        assert np.array_equal(uniforms(3, Stream.DROP, 7, low, high, count), whole[low:high])


def test_numbers_are_uniform_and_independent() -> None:
    """They are independent between neighbouring positions, within a position, and between seeds, epochs and streams."""
    count = 40_000
    drawn = uniforms(0, Stream.DROP, 0, 0, count, 6)
    assert kstest(drawn.ravel(), "uniform").pvalue > 1e-3
    others = [uniforms(*key, 0, count, 6) for key in product((0, 1), Stream, (0, 1)) if key != (0, Stream.DROP, 0)]
    columns = np.column_stack([drawn, np.roll(drawn, 1, 0), *others])
    assert columns.shape == (count, 6 * 9)
    correlation = np.corrcoef(columns.T) - np.eye(6 * 9)
    assert np.abs(correlation).max() < 5 / count**0.5
