"""The process of one contender: python -m tools.bench.peers.worker FD

Its other end is runner.py, which sends JSON orders through the socket FD and gets one JSON answer to each:

    {"open": function, "job": Job, "packages": [...], "warm": seconds}    -> {"versions": "name version, ..."}
    {"run": seconds, "ahead": batches}                                    -> {"images", "seconds", "cpu_seconds"}

or {"missing": why} if a package is not there, {"error": why} if anything else went wrong. The contender idles between orders: an
answer is sent once its threads and workers have filled their queues and come to rest.

Standard library and psutil alone, so that it runs in any Python.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from typing import Any

from tools.bench.peers.job import Job

RESTING = 0.2  # seconds in which a process at rest uses no CPU time that its clock (of 10 ms) shows
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Tree:
    """This process and those below it, as they are now."""

    def __init__(self) -> None:
        import psutil

        this = psutil.Process()
        self.processes = [this, *this.children(recursive=True)]

    def cpu_seconds(self) -> float:
        """User and system time used so far."""
        times = [process.cpu_times() for process in self.processes]
        return float(sum(time.user + time.system for time in times))


class Contender:
    """Batches, drawn on order."""

    def __init__(self, function: str, job: Job) -> None:
        module, name = function.split(":")
        make: Callable[[Job], Iterator[Any]] = getattr(importlib.import_module(module), name)
        self.job = job
        self.batches = make(job)

    def next(self) -> int:
        """Wait for a batch; its number of images."""
        images, _ = next(self.batches)
        return len(images)

    def check(self) -> None:
        """The next batch is what the job asks for."""
        images, labels = next(self.batches)
        shape, dtype = tuple(images.shape), str(images.dtype).rpartition(".")[2]
        expected = (self.job.batch_size, self.job.size, self.job.size, 3)
        if shape != expected or dtype != self.job.out or len(labels) != len(images):
            raise ValueError(f"its batch is {dtype} {shape} with {len(labels)} labels, not {self.job.out} {expected}")

    def warm(self, seconds: float) -> None:
        """An epoch, and at least so long."""
        began, images = time.perf_counter(), 0
        while images < self.job.images or time.perf_counter() - began < seconds:
            images += self.next()

    def run(self, seconds: float, ahead: int) -> dict[str, float]:
        """Whole batches for about so long. The first `ahead` were made before and do not count."""
        for _ in range(ahead):
            self.next()
        tree = Tree()
        began, used, images = time.perf_counter(), tree.cpu_seconds(), 0
        while time.perf_counter() - began < seconds:
            images += self.next()
        took = time.perf_counter() - began
        return {"images": images, "seconds": took, "cpu_seconds": tree.cpu_seconds() - used}


def rest(limit: float = 10.0) -> None:
    """Return when this process and those below it use no CPU time."""
    tree, deadline = Tree(), time.perf_counter() + limit
    used = -1.0
    while (now := tree.cpu_seconds()) != used and time.perf_counter() < deadline:
        used = now
        time.sleep(RESTING)


def versions(packages: list[str]) -> str:
    found = []
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:  # comes under another name, as opencv-python-headless does
            continue
    return ", ".join(found)


def serve(connection: Connection) -> None:
    """Answer orders until the other end is closed."""
    contender: Contender | None = None
    while True:
        try:
            order = json.loads(connection.recv_bytes())
        except EOFError:
            return
        answer: dict[str, Any]
        try:
            if contender is None:
                contender = Contender(order["open"], Job.of(order["job"]))
                contender.check()
                contender.warm(order["warm"])
                answer = {"versions": versions(order["packages"])}
            else:
                answer = dict(contender.run(order["run"], order["ahead"]))
            rest()
        except ImportError as error:
            answer = {"missing": first_line(error)}
        except Exception as error:  # whatever a contender raises is its row
            answer = {"error": first_line(error)}
        connection.send_bytes(json.dumps(answer).encode())


def report_threads(connection: Connection) -> None:
    """An exception in any thread is an answer: FFCV's main thread would wait for ever for one that died."""

    def answer(failure: threading.ExceptHookArgs) -> None:
        error = failure.exc_value or failure.exc_type()
        connection.send_bytes(json.dumps({"error": first_line(error)}).encode())
        os._exit(1)

    threading.excepthook = answer


def first_line(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
    return f"{type(error).__name__}: {text}"


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # die with the benchmark, even where it is killed
    connection = Connection(int(sys.argv[1]))
    report_threads(connection)
    serve(connection)


if __name__ == "__main__":
    main()
