from __future__ import annotations

import pytest

from training.schedule import learning_rate, plateaus


def rate(schedule: str, progress: float, warmup: float = 0.0, errors: tuple[float, ...] = ()) -> float:
    return learning_rate(schedule, 0.1, progress, warmup, errors)


def test_step_divides_by_ten_after_30_and_60_of_90_epochs() -> None:
    assert [rate("step", epoch / 90) for epoch in (0, 29.99, 30, 59.99, 60, 89.99)] == pytest.approx(
        [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    )


def test_cosine_falls_from_the_base_to_nothing() -> None:
    assert [rate("cosine", progress) for progress in (0, 0.25, 0.5, 1)] == pytest.approx([0.1, 0.0853553, 0.05, 0], abs=1e-7)
    assert rate("cosine", 0.6, warmup=0.2) == pytest.approx(0.05)


@pytest.mark.parametrize("schedule", ["step", "plateau", "cosine"])
def test_warm_up_is_linear_from_nothing(schedule: str) -> None:
    assert [rate(schedule, progress, warmup=0.1) for progress in (0, 0.05, 0.1)] == pytest.approx([0, 0.05, 0.1])


def test_plateau_divides_after_three_epochs_without_a_lower_error() -> None:
    falling = (0.9, 0.8, 0.7)
    assert [rate("plateau", 0.5, errors=falling + stuck) for stuck in ((), (0.7, 0.8), (0.7, 0.8, 0.75))] == pytest.approx(
        [0.1, 0.1, 0.01]
    )
    assert plateaus((0.5, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6)) == 2
    assert plateaus((0.5, 0.6, 0.6, 0.4, 0.6, 0.6)) == 0
    assert plateaus(()) == 0


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="step, plateau, cosine"):
        rate("linear", 0.5)
