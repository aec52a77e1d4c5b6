from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from training.schedule import Schedule, image_sizes, plateaus


def test_step_divides_by_ten_at_its_milestones() -> None:
    schedule = Schedule("step", 0.1, 90, (30, 60))
    assert [schedule.rate(epoch, ()) for epoch in (0, 29, 30, 59, 60, 89)] == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_cosine_is_torchs() -> None:
    schedule = Schedule("cosine", 0.1, 1000)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)
    for step in range(999):
        before = theirs.get_last_lr()[0]
        optimizer.step()
        theirs.step()
        assert schedule.rate(step, ()) == pytest.approx((before + theirs.get_last_lr()[0]) / 2, abs=1e-6)  # ours: a step's middle
    assert Schedule("cosine", 0.1, 1000, warmup=200).rate(599, ()) == pytest.approx(0.05, rel=1e-2)


@pytest.mark.parametrize("kind", ["step", "plateau", "cosine", "linear"])
def test_warm_up_is_linear_from_nothing_or_constant(kind: str) -> None:
    rising = Schedule(kind, 0.1, 1000, warmup=100)
    assert [rising.rate(step, ()) for step in (0, 49, 99)] == pytest.approx([0.0005, 0.0495, 0.0995])
    constant = Schedule(kind, 0.1, 1000, warmup=400, warmup_lr=0.01)
    assert [constant.rate(step, ()) for step in (0, 399)] == [0.01, 0.01]
    assert constant.rate(400, ()) == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("patience", [0, 1, 3])
def test_plateau_is_torchs_reduce_on_plateau(patience: int) -> None:
    rng = random.Random(patience)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=patience, min_lr=0, eps=0)
    schedule = Schedule("plateau", 0.1, 10_000, patience=patience)
    errors: list[float] = []
    for step in range(60):
        assert schedule.rate(step, errors) == pytest.approx(optimizer.param_groups[0]["lr"])
        errors.append(round(0.3 + 0.7 / (1 + step) + rng.uniform(-0.05, 0.05), 3))
        theirs.step(errors[-1])
    assert 0 < plateaus(errors, patience) < 60


def test_plateau_forgets_a_gain_too_small_to_see() -> None:
    assert plateaus((0.5, 0.49999, 0.49998), 1) == 1
    assert plateaus((0.5, 0.49, 0.48), 1) == 0
    assert plateaus((), 1) == 0


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="step, plateau, cosine, linear"):
        Schedule("square", 0.1, 10).rate(5, ())


def test_linear_is_a_straight_line_to_nothing() -> None:
    """ffcv-imagenet's get_cyclic_lr: np.interp over [0, peak, epochs]."""
    schedule = Schedule("linear", 0.5, 160, warmup=20)
    expected = np.interp(np.arange(160) + 0.5, [0, 20, 160], [0, 0.5, 0])
    assert [schedule.rate(step, ()) for step in range(160)] == pytest.approx(expected.tolist())


def test_image_sizes_are_ffcv_imagenets_but_for_the_rounding() -> None:
    """np.interp over the ramp; ours in multiples of 16 above the start, rounded down."""
    steps = dict(image_sizes(128, 224, (4, 10), 14))
    size, found = 0, []
    for epoch in range(14):
        size = steps.get(epoch, size)
        found.append(size)
    wanted = np.interp(np.arange(14), [4, 10], [128, 224])
    assert found == [int(side) // 16 * 16 for side in wanted.tolist()]
    assert image_sizes(160, 192, (11, 13), 16) == ((0, 160), (12, 176), (13, 192))
    assert image_sizes(64, 64, (0, 0), 1) == ((0, 64),)
    assert image_sizes(64, 80, (0, 0), 1) == ((0, 80),)
    assert image_sizes(32, 41, (0, 2), 3) == ((0, 32), (2, 41))
    with pytest.raises(ValueError, match="no ramp from epoch 1 to 3 in 3 epochs"):
        image_sizes(64, 80, (1, 3), 3)
