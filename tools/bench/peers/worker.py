"""The process of one contender: python -m tools.bench.peers.worker FD

runner.py controls it: it sends JSON orders through the socket FD and receives one JSON answer to each:

    {"open": function, "job": Job, "packages": [...], "warm": seconds}    -> {"versions": "name version, ..."}
    {"run": seconds, "ahead": batches}                                    -> {"images", "seconds", "cpu_seconds"}

or {"missing": reason} if a package is not installed, {"error": reason} if anything else fails. The contender is idle between
orders: an answer is sent once its threads and workers have filled their queues and use no more CPU time.

This module imports only the standard library and psutil, so that it runs in any Python.
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

RESTING = 0.2  # a process is idle if it uses no CPU time for so many seconds; the clock's resolution is 10 ms
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Tree:
    """This process and its current descendants."""

    def __init__(self) -> None:
        import psutil

        this = psutil.Process()
        self.processes = [this, *this.children(recursive=True)]

    def cpu_seconds(self) -> float:
        """User and system time used so far."""
        times = [process.cpu_times() for process in self.processes]
        return float(sum(time.user + time.system for time in times))


class Contender:
    """A contender's batches."""

    def __init__(self, function: str, job: Job) -> None:
        module, name = function.split(":")
        make: Callable[[Job], Iterator[Any]] = getattr(importlib.import_module(module), name)
        self.job = job
        self.batches = make(job)

    def next(self) -> int:
        """Wait for a batch; returns its number of images."""
        images, _ = next(self.batches)
        return len(images)

    def check(self) -> None:
        """Raise ValueError unless the next batch has the job's shape and dtype."""
        images, labels = next(self.batches)
        shape, dtype = tuple(images.shape), str(images.dtype).rpartition(".")[2]
        expected = (self.job.batch_size, self.job.size, self.job.size, 3)
        if shape != expected or dtype != self.job.out or len(labels) != len(images):
            raise ValueError(f"its batch is {dtype} {shape} with {len(labels)} labels, not {self.job.out} {expected}")

    def warm(self, seconds: float) -> None:
        """Run for at least an epoch, and for at least `seconds`."""
        began, images = time.perf_counter(), 0
        while images < self.job.images or time.perf_counter() - began < seconds:
            images += self.next()

    def run(self, seconds: float, ahead: int) -> dict[str, float]:
        """Take batches for about `seconds`. The first `ahead` batches may have been prefetched and do not count."""
        for _ in range(ahead):
            self.next()
        tree = Tree()
        began, used, images = time.perf_counter(), tree.cpu_seconds(), 0
        while time.perf_counter() - began < seconds:
            images += self.next()
        took = time.perf_counter() - began
        return {"images": images, "seconds": took, "cpu_seconds": tree.cpu_seconds() - used}


def rest(limit: float = 10.0) -> None:
    """Wait until this process and its descendants use no CPU time, for at most `limit` seconds."""
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
        except PackageNotFoundError:  # installed under another name, such as opencv-python-headless
            continue
    return ", ".join(found)


def serve(connection: Connection) -> None:
    """Answer orders until the runner closes the connection."""
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
        except Exception as error:  # any failure of a contender goes into its row
            answer = {"error": first_line(error)}
        connection.send_bytes(json.dumps(answer).encode())


def report_threads(connection: Connection) -> None:
    """Answer with the exception of any thread that fails. Without this, FFCV's main thread would wait forever for that thread."""

    def answer(failure: threading.ExceptHookArgs) -> None:
        error = failure.exc_value or failure.exc_type()
        connection.send_bytes(json.dumps({"error": first_line(error)}).encode())
        os._exit(1)

    threading.excepthook = answer


def first_line(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
    return f"{type(error).__name__}: {text}"


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # end with the benchmark, even if it is killed
    connection = Connection(int(sys.argv[1]))
    report_threads(connection)
    serve(connection)


if __name__ == "__main__":
    main()
