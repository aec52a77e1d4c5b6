"""Handling of SIGTERM, which Slurm, Kubernetes and torchrun send before they kill a process: all ranks stop after the same step,
and the run saves a checkpoint."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import distributed

T = TypeVar("T")


class Stopped(Exception):  # noqa: N818 (no error)
    """At least one rank has received SIGTERM. All ranks raise this at the same step."""


class StopRequest:
    """Catches SIGTERM, from its construction on.

    Ranks agree on the CPU, through gloo, which does not synchronize with a GPU. If a rank has died, the others get an error at
    their next step instead of waiting for NCCL's time-out.
    """

    def __init__(self, processes: int) -> None:
        self._requested = False
        self._group = distributed.new_group(backend="gloo") if processes > 1 else None
        signal.signal(signal.SIGTERM, self._request)

    def _request(self, *_: Any) -> None:
        self._requested = True

    def check(self) -> None:
        """Raise Stopped if any rank has received SIGTERM. All ranks must call this the same number of times."""
        requested = torch.tensor(int(self._requested))
        if self._group is not None:
            distributed.all_reduce(requested, distributed.ReduceOp.MAX, self._group)
        if requested:
            raise Stopped

    def checked(self, batches: Iterable[T], count: int) -> Iterator[T]:
        """Yield the same batches, with a check before each. count: the largest number of batches on any rank, so that all ranks
        check equally often."""
        done = 0
        for batch in batches:
            self.check()
            done += 1
            yield batch
        for _ in range(count - done):
            self.check()
