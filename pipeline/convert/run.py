"""Run shard tasks in local processes or on a Ray cluster. Both run the same function on the same tasks."""

from __future__ import annotations

import io
import logging
import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import UserError, install_command
from ..jit import compiling_beside, is_cached
from ..jpeg.blocks import components_of, scan_order, tokenize
from ..jpeg.entropy import read_scan
from ..jpeg.header import parse
from ..jpeg.scans import read_coefficients
from ..jpeg.transcode import transcode
from ..progress import announce_if_slow, progress_bar
from .task import ShardTask, run

_done: Connection  # of a worker: a byte for each finished image, for the progress bar. A shared counter would need mmap


def run_local(tasks: Sequence[ShardTask], workers: int) -> None:
    """Run all tasks in `workers` processes; 1 means in this process. The first error stops all. Finished shards are kept."""
    compile_transcoder()
    if min(workers, len(tasks)) == 1:
        with progress_bar(total=sum(len(task.sources) for task in tasks), unit=" images", smoothing=0.1, delayed=False) as bar:
            for task in tasks:
                run(task, bar.update)
        return
    context = multiprocessing.get_context("spawn")
    done, report = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(min(workers, len(tasks)), context, _start_worker, (report,))
    bar = progress_bar(total=sum(len(task.sources) for task in tasks), unit=" images", smoothing=0.1, delayed=False)
    try:
        pending: set[Future[None]] = {pool.submit(_run_counted, task) for task in tasks}
        while pending:
            finished, pending = wait(pending, timeout=0.5, return_when=FIRST_EXCEPTION)
            while done.poll():
                bar.update(len(os.read(done.fileno(), 1 << 16)))
            for future in finished:
                future.result()
    except BaseException as error:
        for process in list(pool._processes.values()):  # the pool would first finish the shards in progress
            process.terminate()
        if isinstance(error, BrokenProcessPool):
            raise UserError(
                "a worker process was killed, perhaps because memory ran out",
                "try fewer `workers`; the same command again keeps the finished shards",
            ) from error
        raise
    finally:
        bar.close()
        pool.shutdown(cancel_futures=True)


def compile_transcoder() -> None:
    """Compile the JPEG transcoder into numba's cache, so that the workers do not all compile it."""
    if is_cached(read_scan) and is_cached(tokenize):
        return
    with (
        announce_if_slow("compiling the JPEG transcoder, once on this machine, which takes about 10 seconds on two cores"),
        compiling_beside(compile_progressive),
    ):
        transcode(_any_jpeg(progressive=False))


def compile_progressive() -> None:
    """Compile what only JPEGs of several scans need."""
    data = _any_jpeg(progressive=True)
    header = parse(data)
    coefficients = read_coefficients(data, header)
    ints = np.zeros(1024, np.int64)
    tokenize(coefficients, *scan_order(components_of(header)), 0, 1, np.zeros(64, np.uint32), ints, ints)


def _any_jpeg(progressive: bool) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "JPEG", subsampling="4:4:4", progressive=progressive)
    return stream.getvalue()


def _start_worker(done: Connection) -> None:
    global _done
    _done = done
    end_with_parent()


def end_with_parent() -> None:
    """End this worker when its parent dies. Otherwise the workers of a killed parent would wait forever."""

    def wait() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _run_counted(task: ShardTask) -> None:
    run(task, lambda: os.write(_done.fileno(), b"."))


def run_ray(tasks: Sequence[ShardTask], address: str) -> None:
    """Run all tasks on an existing Ray cluster, one core each. If a node dies, its tasks run elsewhere; finished shards are kept.

    Source and output must be accessible from every node: URLs, or a shared file system.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError("`engine` ray: Ray is not installed", f"install it: {install_command('ray')}") from error
    package = Path(__file__).resolve().parents[1]
    try:
        ray.init(
            address=address,
            runtime_env={"py_modules": [str(package)]},  # ships this library to the nodes
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except Exception as error:
        raise UserError(f"no Ray cluster at {address!r} ({error})", "start one: ray start --head") from error
    try:
        remote: Callable[..., Any] = ray.remote(max_retries=10)(run).remote
        sizes = {remote(task): len(task.sources) for task in tasks}
        with progress_bar(total=sum(sizes.values()), unit=" images", delayed=False) as bar:
            pending = list(sizes)
            while pending:
                finished, pending = ray.wait(pending, timeout=1)
                for reference in finished:
                    ray.get(reference)
                    bar.update(sizes[reference])
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, UserError) else error from None
    finally:
        ray.shutdown()
