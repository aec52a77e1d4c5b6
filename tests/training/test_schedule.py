from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from training.schedule import Schedule, image_sizes, plateaus


def test_step_divides_by_ten_at_its_milestones() -> None:
    schedule = Schedule("step", 0.1, 90, (30, 60))
    assert [schedule.rate(epoch, ()) for epoch in (0, 29, 30, 59, 60, 89)] == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_cosine_equals_torch() -> None:
    schedule = Schedule("cosine", 0.1, 1000)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)
    for step in range(999):
        before = reference.get_last_lr()[0]
        optimizer.step()
        reference.step()
        assert schedule.rate(step, ()) == pytest.approx(
            (before + reference.get_last_lr()[0]) / 2, abs=1e-6
        )  # Schedule gives the rate in the middle of a step
    assert Schedule("cosine", 0.1, 1000, warmup=200).rate(599, ()) == pytest.approx(0.05, rel=1e-2)


@pytest.mark.parametrize("kind", ["step", "plateau", "cosine", "linear"])
def test_warm_up_is_linear_from_zero_or_constant(kind: str) -> None:
    linear = Schedule(kind, 0.1, 1000, warmup=100)
    assert [linear.rate(step, ()) for step in (0, 49, 99)] == pytest.approx([0.0005, 0.0495, 0.0995])
    constant = Schedule(kind, 0.1, 1000, warmup=400, warmup_lr=0.01)
    assert [constant.rate(step, ()) for step in (0, 399)] == [0.01, 0.01]
    assert constant.rate(400, ()) == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("patience", [0, 1, 3])
def test_plateau_equals_torchs_reduce_on_plateau(patience: int) -> None:
    rng = random.Random(patience)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1)
    reference = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=patience, min_lr=0, eps=0)
    schedule = Schedule("plateau", 0.1, 10_000, patience=patience)
    errors: list[float] = []
    for step in range(60):
        assert schedule.rate(step, errors) == pytest.approx(optimizer.param_groups[0]["lr"])
        errors.append(round(0.3 + 0.7 / (1 + step) + rng.uniform(-0.05, 0.05), 3))
        reference.step(errors[-1])
    assert 0 < plateaus(errors, patience) < 60


def test_plateau_ignores_improvements_below_the_threshold() -> None:
    assert plateaus((0.5, 0.49999, 0.49998), 1) == 1
    assert plateaus((0.5, 0.49, 0.48), 1) == 0
    assert plateaus((), 1) == 0


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="step, plateau, cosine, linear"):
        Schedule("square", 0.1, 10).rate(5, ())


def test_linear_is_a_straight_line_to_zero() -> None:
    """As ffcv-imagenet's get_cyclic_lr: np.interp over [0, peak, epochs]."""
    schedule = Schedule("linear", 0.5, 160, warmup=20)
    expected = np.interp(np.arange(160) + 0.5, [0, 20, 160], [0, 0.5, 0])
    assert [schedule.rate(step, ()) for step in range(160)] == pytest.approx(expected.tolist())


def test_image_sizes_equal_ffcv_imagenets_up_to_rounding() -> None:
    """np.interp over the ramp, rounded down to the start plus a multiple of 16."""
    steps = dict(image_sizes(128, 224, (4, 10), 14))
    size, found = 0, []
    for epoch in range(14):
        size = steps.get(epoch, size)
        found.append(size)
    expected = np.interp(np.arange(14), [4, 10], [128, 224])
    assert found == [int(side) // 16 * 16 for side in expected.tolist()]
    assert image_sizes(160, 192, (11, 13), 16) == ((0, 160), (12, 176), (13, 192))
    assert image_sizes(64, 64, (0, 0), 1) == ((0, 64),)
    assert image_sizes(64, 80, (0, 0), 1) == ((0, 80),)
    assert image_sizes(32, 41, (0, 2), 3) == ((0, 32), (2, 41))
    with pytest.raises(ValueError, match="no ramp from epoch 1 to 3 in 3 epochs"):
        image_sizes(64, 80, (1, 3), 3)
