"""Training from a bucket that the cache cannot hold: python tools/bench/bench_remote.py SHARDS

Serves SHARDS over HTTP on this machine, from a process of its own, with a latency for each request and a limited bandwidth for
all together. The CPU engine reads whole epochs in four ways, with a new cache for `CACHED` of the data:

- crop: order full; of each image, the ranges that its crop needs, read ahead;
- image: order full; each whole image in one range, read ahead;
- blocks: order blocks of one shard; whole shards, downloaded ahead into the cache;
- shards: order full; whole shards, downloaded again whenever the cache has lost them. Only `FEW` images are read.

Bytes and requests include what was read ahead beyond the last batch. CPU time is that of the loader's process alone. Rows go
to tools/bench/results/remote.csv. Needs aiohttp, which the extra `s3` installs.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import tempfile
import time
import urllib.request
from multiprocessing.connection import Connection
from pathlib import Path
from socket import create_server
from unittest.mock import patch

import _path  # noqa: F401
from aiohttp import web

from pipeline import LoaderSpec, open_loader
from pipeline.cli import Parser, positive, run_cli
from pipeline.engines import ranges
from pipeline.plan.geometry import choose_geometry
from pipeline.store.cache import GIGABYTE
from pipeline.store.shards import ShardSet
from tools.bench.recording import RESULTS, Figure, record

MODES = ("crop", "image", "blocks", "shards")
FEW = 40
CACHED = 0.8
PIECE = 1 << 16  # bytes that the server sends at a time


def serve(folder: Path, latency: float, bytes_per_s: float, ready: Connection) -> None:
    """Serve the files of a folder, by ranges. /counts: how many requests there were, and how many bytes were sent."""
    counted, free_at = [0, 0], 0.0  # free_at: when the bytes admitted so far have been transferred

    async def answer(request: web.Request) -> web.StreamResponse:
        nonlocal free_at
        if request.path == "/counts":
            return web.json_response(counted)
        await asyncio.sleep(latency)
        file = folder / request.path.lstrip("/")
        if not file.is_file():
            raise web.HTTPNotFound
        size = file.stat().st_size
        start, end, _ = request.http_range.indices(size)
        headers = {"Accept-Ranges": "bytes", "Content-Range": f"bytes {start}-{end - 1}/{size}"}
        response = web.StreamResponse(status=206 if "Range" in request.headers else 200, headers=headers)
        response.content_length = end - start
        await response.prepare(request)
        if request.method == "GET":
            with file.open("rb") as stream:
                stream.seek(start)
                for at in range(start, end, PIECE):
                    piece = stream.read(min(PIECE, end - at))
                    free_at = max(free_at, time.monotonic()) + len(piece) / bytes_per_s
                    await asyncio.sleep(free_at - time.monotonic())
                    await response.write(piece)
            counted[1] += end - start
        counted[0] += 1
        return response

    app, socket = web.Application(), create_server(("127.0.0.1", 0))
    app.router.add_get("/{path:.*}", answer)
    ready.send(socket.getsockname()[1])
    web.run_app(app, sock=socket, print=None)


def measure(url: str, mode: str, spec: LoaderSpec, epochs: int) -> dict[str, float]:
    """Read epochs from the server in one of the MODES."""
    with tempfile.TemporaryDirectory() as cache:
        order = "blocks" if mode == "blocks" else "full"
        before, began, cpu = counts(url), time.perf_counter(), time.process_time()
        spec = LoaderSpec(**{**vars(spec), "data": url, "order": order, "cache": cache})
        whole = 1 << 30 if mode == "image" else ranges.WHOLE
        with patch.object(ranges, "WHOLE", whole), open_loader(spec) as loader:
            loader.shards.by_ranges = mode in ("crop", "image")
            images = 0
            for _ in range(1 if mode == "shards" else epochs):
                for batch in loader:
                    images += len(batch.ids)
                    if mode == "shards" and images >= FEW:
                        break
            seconds, after = time.perf_counter() - began, counts(url)
    return {
        "images_per_s": images / seconds,
        "cpu_ms_per_image": (time.process_time() - cpu) / images * 1e3,
        "kb_per_image": (after[1] - before[1]) / images / 1e3,
        "requests_per_image": (after[0] - before[0]) / images,
    }


def counts(url: str) -> list[int]:
    with urllib.request.urlopen(f"{url}/counts") as answer:
        found: list[int] = json.load(answer)
        return found


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="a folder of at least four shards")
    parser.add_argument("--geometry", default="jitter", choices=("jitter", "rrc"), help="crops (default: %(default)s)")
    parser.add_argument("--latency-ms", type=float, default=20, help="of each request (default: %(default)g)")
    parser.add_argument("--megabytes-per-s", type=float, nargs="+", default=[10, 50], help="bandwidths (default: 10 50)")
    parser.add_argument("--epochs", type=positive, default=3, help="in each measurement (default: %(default)s)")
    parser.add_argument("--repeats", type=positive, default=5, help="of each measurement (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS / "remote.csv")
    args = parser.parse_args()
    local = ShardSet(args.shards, "train")
    cached = sum(file.stat().st_size for file in local.shards) * CACHED + local.samples.nbytes
    geometry = choose_geometry(args.geometry, None, 224)
    spec = LoaderSpec("", batch_size=20, block_shards=1, geometry=geometry, engine="cpu", threads=2, cache_gb=cached / GIGABYTE)
    for megabytes in args.megabytes_per_s:
        receiver, sender = multiprocessing.Pipe(duplex=False)
        settings = args.shards, args.latency_ms / 1e3, megabytes * 1e6, sender
        server = multiprocessing.get_context("spawn").Process(target=serve, args=settings, daemon=True)
        server.start()
        url = f"http://127.0.0.1:{receiver.recv()}"
        found: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
        measure(url, "crop", spec, 1)  # compiles
        for _ in range(args.repeats):
            for mode in MODES:
                found[mode].append(measure(url, mode, spec, args.epochs))
        for mode, runs in found.items():
            figures = [Figure(metric, [run[metric] for run in runs]) for metric in runs[0]]
            what = f"{mode}, {args.geometry}, {args.latency_ms:g} ms, {megabytes:g} MB/s, {len(local)} images"
            record(args.results, "remote", *figures, engine="cpu", spec=what, cache=f"{CACHED:.0%} of the data")
        server.terminate()


if __name__ == "__main__":
    run_cli(main)
