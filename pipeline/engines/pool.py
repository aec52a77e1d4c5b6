"""Worker threads that fill batches in chunks, several batches ahead, for the CPU engine, DALI's input and `multiview`."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

from ..store.waiting import DaemonPool

Job = TypeVar("Job")
Worker = TypeVar("Worker")


class WorkerPool(Generic[Job, Worker]):
    """A queue of jobs that threads work on. Each job is one batch; threads make its images in chunks.

    fill(worker, job, indices): make the images `indices` of a job. worker: the thread's own state, from `make_worker()`.
    Threads start with the first job and end with `close`. Afterwards the pool can be used again.
    """

    def __init__(
        self, threads: int, chunk: int, make_worker: Callable[[], Worker], fill: Callable[[Worker, Job, range], None]
    ) -> None:
        self._count, self._chunk, self._make_worker, self._fill = threads, chunk, make_worker, fill
        self._local = threading.local()
        self._threads: DaemonPool | None = None
        self._jobs: deque[tuple[Job, list[Future[None]]]] = deque()

    def __len__(self) -> int:
        """Jobs in progress."""
        return len(self._jobs)

    def submit(self, job: Job, images: int) -> None:
        """Hand a job to the threads. images: how many it has."""
        self._threads = self._threads or DaemonPool(self._count)
        chunks = [
            self._threads.submit(self._run, job, range(first, min(first + self._chunk, images)))
            for first in range(0, images, self._chunk)
        ]
        self._jobs.append((job, chunks))

    def next(self) -> Job:
        """Wait for the oldest job, remove and return it. Raises what its threads raised."""
        job, chunks = self._jobs.popleft()
        for chunk in chunks:
            chunk.result()
        return job

    def ready(self) -> int:
        """The number of finished jobs. May be called from any thread."""
        return sum(all(chunk.done() for chunk in chunks) for _, chunks in self._jobs.copy())

    def close(self) -> None:
        """Drop all jobs and end the threads. Waits for the chunks in progress, but not long for remote storage."""
        self._jobs.clear()
        threads, self._threads = self._threads, None  # first, as closing can be interrupted
        if threads:
            threads.close()

    def _run(self, job: Job, indices: range) -> None:
        if not hasattr(self._local, "worker"):
            self._local.worker = self._make_worker()
        self._fill(self._local.worker, job, indices)
