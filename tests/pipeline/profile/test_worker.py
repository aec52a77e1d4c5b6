"""What a loader's process measures: turns at full speed and with a consumer, and epochs. Time passes as the tests say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from pipeline.errors import UserError
from pipeline.profile import worker
from tests.helpers import FakeTime

BATCH = np.zeros((10, 4, 4, 3), np.uint8)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake = FakeTime()
    monkeypatch.setattr(worker, "time", fake)
    monkeypatch.setattr(worker.processes, "cpu_seconds", lambda process: 3 * fake.now)  # three busy cores
    return fake


class Slow:
    """100 images/s if it is asked for one batch after the other, after `ready` batches that are there already."""

    def __init__(self, clock: FakeTime, ready: int = 0, batches: int = 1_000_000) -> None:
        self.clock, self.ready, self.batches = clock, ready, batches

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.batches):
            if self.ready:
                self.ready -= 1
            else:
                self.clock.now += 0.1
            yield BATCH


@pytest.mark.parametrize("ready", [0, 30])
def test_batches_that_were_prefetched_before_do_not_count(clock: FakeTime, ready: int) -> None:
    turn = worker.Source(lambda: Slow(clock, ready), "x").run(8.0, None)
    assert turn.images / turn.seconds == pytest.approx(100)
    assert turn.seconds == pytest.approx(6, abs=0.11)
    assert turn.waited == pytest.approx(turn.seconds)
    assert turn.cpu_seconds / turn.images == pytest.approx(0.03)


def test_a_turn_of_a_slow_loader_is_one_batch(clock: FakeTime) -> None:
    source = worker.Source(lambda: Slow(clock), "x")
    source.take(0.0)
    assert (source.run(0.05, None).batches, source.taken) == (1, 2)


@pytest.mark.parametrize(("demand", "share"), [(50, 1 / 3), (100, 1 / 2), (900, 0.9)])
def test_a_consumer_waits_while_a_loader_without_prefetching_works(clock: FakeTime, demand: float, share: float) -> None:
    """A batch takes 0.1 s, and the consumer's step 10 / demand; they take turns."""
    turn = worker.Source(lambda: Slow(clock), "x").run(8.0, demand)
    assert turn.waited / turn.seconds == pytest.approx(share)
    assert turn.images / turn.seconds == pytest.approx(10 / (0.1 + 10 / demand))


def test_epochs_follow_each_other_and_are_counted(clock: FakeTime) -> None:
    class WithReset(Slow):
        """As DALI's iterators: after an epoch there are no batches before `reset`."""

        ended = False

        def __iter__(self) -> Iterator[Any]:
            if not self.ended:
                yield from super().__iter__()
                self.ended = True

        def reset(self) -> None:
            self.ended = False

    for make in (lambda: Slow(clock, batches=4), lambda: WithReset(clock, batches=4), lambda: iter(Slow(clock, batches=4))):
        turn = worker.Source(make, "x").take(1.95)
        assert (turn.images, turn.batches, turn.epochs) == (200, 20, 4), make


def test_a_loader_that_yields_nothing_or_only_one_epoch_is_an_error(clock: FakeTime) -> None:
    with pytest.raises(UserError, match=r"`loader` x: yields no batches$"):
        worker.Source(lambda: (), "x").next()
    once = iter(Slow(clock, batches=4))
    with pytest.raises(UserError, match="more than one epoch; give a function"):
        worker.Source(lambda: once, "x").take(1.0)


def test_batches_without_images_are_an_error() -> None:
    with pytest.raises(UserError, match="no tensor or array; the first is of type list of Slow; return one loader"):
        worker.Source(lambda: [[Slow(FakeTime())]], "x").next()
