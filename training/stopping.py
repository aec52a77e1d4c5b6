"""SIGTERM, as Slurm, Kubernetes and torchrun send it before they kill: the run saves and ends, all processes after one step."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import distributed

T = TypeVar("T")


class Stopped(Exception):  # noqa: N818 (no error)
    """A process of the run was asked to stop; all of them raise this at the same place."""


class StopRequest:
    """Notices SIGTERM, from when it is made on.

    Processes agree on the host, through gloo: no GPU is waited for, and where a process has died the others get an error at
    their next step instead of waiting in NCCL for its time-out.
    """

    def __init__(self, processes: int) -> None:
        self._asked = False
        self._group = distributed.new_group(backend="gloo") if processes > 1 else None
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_: Any) -> None:
        self._asked = True

    def check(self) -> None:
        """Raise Stopped if any process was asked to stop. All processes must call this equally often."""
        asked = torch.tensor(int(self._asked))
        if self._group is not None:
            distributed.all_reduce(asked, distributed.ReduceOp.MAX, self._group)
        if asked:
            raise Stopped

    def checked(self, batches: Iterable[T], count: int) -> Iterator[T]:
        """The same batches, `count` of them in all processes that have the most, with a check before each."""
        done = 0
        for batch in batches:
            self.check()
            done += 1
            yield batch
        for _ in range(count - done):
            self.check()
