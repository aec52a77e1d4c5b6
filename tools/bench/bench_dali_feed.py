"""What DALI's engine takes of the thread that trains, per batch: python tools/bench/bench_dali_feed.py /data/shards

The graph is a stub that decodes nothing, so neither a GPU nor time for decoding is needed. Measures the CPU time of this thread,
and the time that it is kept from training, with a pause before each batch for the others. Rows go to
tools/bench/results/profile.csv by default.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import _path  # noqa: F401
import numpy as np
import torch
from nvidia.dali import fn, types

from pipeline.cli import positive, run_cli
from pipeline.engines import dali
from pipeline.spec import LoaderSpec
from tools.bench.recording import RESULTS, Figure, record

SIZE = 224


def stub(sources: Any, *_: Any, **__: Any) -> list[Any]:
    """Black views, made of one number of each input, so that no input is left out. Stands in for `dali.graph`."""
    firsts = [fn.cast(fn.slice(fn.reshape(source, shape=[-1]), 0, 1, axes=[0]), dtype=types.UINT8) for source in sources]
    pixel = fn.reshape(sum(firsts[1:], firsts[0]) * 0, shape=[1, 1, 1])
    return [fn.cast(types.Constant(np.zeros((SIZE, SIZE, 3), np.uint8), device="cpu") + pixel, dtype=types.UINT8)]


def measure(spec: LoaderSpec, batches: int, pause: float) -> tuple[list[float], list[float]]:
    """CPU seconds of this thread, and seconds, for each batch. pause: seconds before each of them, for training."""
    cpu: list[float] = []
    wall: list[float] = []
    with dali.open(spec) as loader:
        while len(wall) < batches + 3:
            for _ in loader_batches(loader, pause, cpu, wall):
                if len(wall) == batches + 3:
                    break
    return cpu[3:], wall[3:]  # without those in which DALI fills its queue


def loader_batches(loader: Any, pause: float, cpu: list[float], wall: list[float]) -> Any:
    batches = iter(loader)
    while True:
        time.sleep(pause)
        began = time.thread_time(), time.perf_counter()
        try:
            batch = next(batches)
        except StopIteration:
            return
        cpu.append(time.thread_time() - began[0])
        wall.append(time.perf_counter() - began[1])
        yield batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("data")
    parser.add_argument("--batch-size", type=positive, default=256)
    parser.add_argument("--batches", type=positive, default=20)
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--pause-ms", type=positive, default=300)
    parser.add_argument("--results", type=Path, default=RESULTS / "profile.csv")
    args = parser.parse_args()
    dali.graph = stub
    spec = LoaderSpec(args.data, batch_size=args.batch_size, image_size=SIZE, dtype=torch.uint8, threads=args.threads)
    cpu, wall = measure(spec, args.batches, args.pause_ms / 1000)
    figures = (
        Figure(name, [1000 * one for one in values]) for name, values in (("cpu_ms_per_batch", cpu), ("ms_per_batch", wall))
    )
    spec_of_row = f"batches of {args.batch_size}, stub graph, {args.threads} threads, {args.pause_ms} ms between batches"
    record(args.results, "DALI's input, training thread", *figures, engine="dali", spec=spec_of_row, cache="warm")


if __name__ == "__main__":
    run_cli(main)
