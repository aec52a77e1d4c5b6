"""Training from a bucket that the cache cannot hold: python tools/bench/bench_remote.py SHARDS

Serves SHARDS over HTTP on this machine, from a process of its own, with a latency for each request and a limited bandwidth for
all together. The CPU engine reads whole epochs in four ways, with a new cache for `CACHED` of the data:

- crop: order full; of each image, the ranges that its crop needs, read ahead;
- image: order full; each whole image in one range, read ahead;
- blocks: order blocks of one shard; whole shards, downloaded ahead into the cache;
- shards: order full; whole shards, downloaded again whenever the cache has lost them. Only `FEW` images are read.

Bytes and requests include what was read ahead beyond the last batch. CPU time is that of the loader's process alone. Rows go
to tools/bench/results/remote.csv.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import threading
import time
import urllib.request
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import _path  # noqa: F401

from pipeline import LoaderSpec, open_loader
from pipeline.cli import Parser, positive, run_cli
from pipeline.engines import ranges
from pipeline.plan.geometry import choose_geometry
from pipeline.store.cache import GIGABYTE
from pipeline.store.shards import ShardSet
from tools.bench.recording import RESULTS, Figure, record
from tools.profiler.planted import Throttle

MODES = ("crop", "image", "blocks", "shards")
FEW = 40
CACHED = 0.8
PIECE = 1 << 16  # bytes that the server sends at a time


class Handler(BaseHTTPRequestHandler):
    """Files of a folder, by ranges. /counts: how many requests there were, and how many bytes were sent."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # it would add 40 ms
    requests = sent = 0
    lock = threading.Lock()

    def __init__(self, folder: Path, latency: float, throttle: Throttle, *arguments: Any) -> None:
        self.folder, self.latency, self.throttle = folder, latency, throttle
        super().__init__(*arguments)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        if self.path == "/counts":
            self._send(200, json.dumps([Handler.requests, Handler.sent]).encode(), {})
            return
        time.sleep(self.latency)
        file = self.folder / self.path.lstrip("/")
        if not file.is_file():
            self._send(404, b"", {})
            return
        size = file.stat().st_size
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        start, end = int(first), min(int(last or size), size - 1) + 1
        with file.open("rb") as stream:
            stream.seek(start)
            body = stream.read(end - start) if with_body else b""
        headers = {"Accept-Ranges": "bytes", "Content-Range": f"bytes {start}-{end - 1}/{size}"}
        self._send(206 if "Range" in self.headers else 200, body, headers, end - start)
        with Handler.lock:
            Handler.requests, Handler.sent = Handler.requests + 1, Handler.sent + len(body)

    def _send(self, code: int, body: bytes, headers: dict[str, str], length: int | None = None) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(body) if length is None else length)}.items():
            self.send_header(name, value)
        self.end_headers()
        for at in range(0, len(body), PIECE):
            self.throttle.wait_for(len(body[at : at + PIECE]))
            self.wfile.write(body[at : at + PIECE])

    def log_message(self, *_: Any) -> None: ...


class Server(ThreadingHTTPServer):
    request_queue_size = 128  # connections

    def handle_error(self, *_: Any) -> None:
        """Connections end when a loader is closed."""


def serve(folder: Path, latency: float, bytes_per_s: float, ready: Connection) -> None:
    server = Server(("127.0.0.1", 0), partial(Handler, folder, latency, Throttle(bytes_per_s)))
    ready.send(server.server_port)
    server.serve_forever()


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
