"""A contender as a user's loader, for `cropfeed profile --loader tools.bench.peers.foreign:make_loader`."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator
from typing import Any

from tools.bench.peers.job import Job

CONTENDER = "BENCH_CONTENDER"  # environment variable: a contender's function and its Job, as JSON


def make_loader() -> Iterator[tuple[Any, Any]]:
    function, job = json.loads(os.environ[CONTENDER])
    module, name = function.split(":")
    batches: Iterator[tuple[Any, Any]] = getattr(importlib.import_module(module), name)(Job.of(job))
    return batches
