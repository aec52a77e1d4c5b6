"""train.py, which also writes the position, ids and views of each training batch to $TRACE.<process>.<rank>.

The views are those that the engine received, not a second evaluation of the plan. If $KILL_AT is a number N, the process kills
itself with SIGKILL before the Nth rename, link, fsync or removal of a checkpoint. If $TERM_IN_VALIDATION is set, it sends itself
SIGTERM in validation.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train
from pipeline.batch import Batch, BatchPlan, BatchRange
from pipeline.cli import run_cli
from pipeline.loader import Loader

given: dict[tuple[int, ...], BatchPlan] = {}
original_plan, original_iter = Loader.plan, Loader.__iter__


def plan(self: Loader, batch_range: BatchRange) -> BatchPlan:
    plan = original_plan(self, batch_range)
    if self.spec.training:
        given[(batch_range.epoch, *plan.ids.tolist())] = plan
    return plan


def iterate(self: Loader) -> Iterator[Batch]:
    name = f"{os.environ['TRACE']}.{os.getpid()}.{self.spec.rank}"
    for batch in original_iter(self):
        if self.spec.training:
            views = given.pop((self.epoch, *batch.ids.tolist())).views
            row = {"epoch": self.epoch, "consumed": self.consumed, "rank": self.spec.rank, "ids": batch.ids.tolist()}
            row["draws"] = [[repr(value) for value in field.tolist()] for field in views if field is not None]
            with Path(name).open("a") as stream:
                stream.write(json.dumps(row) + "\n")
        elif os.environ.get("TERM_IN_VALIDATION"):
            os.kill(os.getpid(), signal.SIGTERM)
        yield batch


def counted(operation: Callable[..., Any]) -> Callable[..., Any]:
    def count(*arguments: Any, **options: Any) -> Any:
        global operations
        operations += any(isinstance(one, int) or "checkpoints" in str(one) for one in arguments)
        if str(operations) == os.environ.get("KILL_AT"):
            os.kill(os.getpid(), signal.SIGKILL)
        return operation(*arguments, **options)

    return count


operations = 0
for owner, name in ((os, "fsync"), (os, "replace"), (Path, "rename"), (Path, "symlink_to"), (shutil, "rmtree")):
    setattr(owner, name, counted(getattr(owner, name)))
Loader.plan = plan  # type: ignore[method-assign]
Loader.__iter__ = iterate  # type: ignore[method-assign]

if __name__ == "__main__":
    run_cli(train.main)
