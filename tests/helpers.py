"""Helpers for several test files: images with structure, JPEGs of every subsampling, and running our scripts as a user does."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import simplejpeg
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"  # real images, on the project's own machines only

SUBSAMPLINGS = ("444", "422", "440", "420", "411", "Gray")


def random_image(height: int, width: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """uint8 (height, width, 3) with smooth colour, edges and some noise, as photographs have."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(coarse).astype(np.float32)
    y, x = np.mgrid[:height, :width]
    pixels += 40 * (np.sin(x / 17.0 + seed) * np.cos(y / 11.0) > 0)[..., None]
    pixels += rng.normal(0, 4, pixels.shape)
    return pixels.clip(0, 255).astype(np.uint8)


def jpeg(pixels: npt.NDArray[np.uint8], subsampling: str = "420", quality: int = 90) -> bytes:
    """A baseline JPEG by libjpeg-turbo. subsampling: one of SUBSAMPLINGS."""
    if subsampling == "Gray":
        grey = np.ascontiguousarray(pixels[..., :1])
        return bytes(simplejpeg.encode_jpeg(grey, quality, "GRAY", "Gray"))
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality, "RGB", subsampling))


def mutate(data: bytes, rng: np.random.Generator, kind: int) -> bytes:
    """Damage a JPEG after its first two bytes. kind: 0 to 2 flip one to seven bits, 3 truncates, 4 inserts a stray marker."""
    mutant = bytearray(data)
    at = int(rng.integers(2, len(mutant)))
    if kind < 3:
        for _ in range(int(rng.integers(1, 8))):
            mutant[int(rng.integers(2, len(mutant)))] ^= 1 << int(rng.integers(8))
    elif kind == 3:
        del mutant[at:]
    else:
        mutant[at:at] = bytes([0xFF, int(rng.integers(0xC0, 256))])
    return bytes(mutant)


def run_mutants(code: str, folder: Path) -> list[int]:
    """Run `code` for $CROPFEED_MUTANTS trials with numba's bounds checking on. Returns the numbers that it prints.

    code: gets ROOT, a seed and the number of trials in sys.argv. folder: for numba's cache, which only this run uses.
    """
    environment = clean_environment() | {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(folder)}
    result = subprocess.run(
        [sys.executable, "-c", code, str(ROOT), "1", os.environ.get("CROPFEED_MUTANTS", "1000")],
        env=environment, capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return [int(number) for number in result.stdout.split()]


def open_image(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def write_image_folder(root: Path, classes: int, train: int, val: int, sides: tuple[int, int] = (40, 90)) -> None:
    """Write an ImageFolder. Images differ in size and subsampling, and classes also in colour and pattern.

    train, val: images per class. sides: range of heights and widths.
    """
    rng = np.random.default_rng(1)
    for split, count in (("train", train), ("val", val)):
        for label in range(classes):
            folder = root / split / f"n{label:08d}"
            folder.mkdir(parents=True)
            for index in range(count):
                height, width = rng.integers(sides[0], sides[1] + 1, 2)
                pixels = random_image(int(height), int(width), int(rng.integers(1 << 30)))
                pixels[..., label % 3] //= 2
                data = jpeg(pixels, SUBSAMPLINGS[index % len(SUBSAMPLINGS)])
                (folder / f"{split}_{label}_{index}.JPEG").write_bytes(data)


def run_script(
    *command: Any, launcher: tuple[str, ...] = (), cwd: Path = Path("/tmp"), **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run one of our scripts as a user would, from another folder and without PYTHONPATH. command: the script, its arguments."""
    script, *arguments = [str(part) for part in command]
    prefix = [sys.executable, *launcher] if launcher else [sys.executable]
    return subprocess.run(
        [*prefix, str(ROOT / script), *arguments],
        cwd=cwd,
        env=clean_environment() | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


class Forked:
    """A process of one of our scripts, forked from fork_server.py. The first process starts the server.

    Only one process runs at a time: the next one begins when this one has ended. Arguments as in `run_script`.
    """

    _server: subprocess.Popen[str] | None = None

    def __init__(self, *command: Any, cwd: Path = Path("/tmp"), **environment: str) -> None:
        if Forked._server is None:
            # Threads of BLAS do not survive a fork.
            one_thread = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
            Forked._server = subprocess.Popen(
                [sys.executable, str(ROOT / "tests" / "fork_server.py")], env=clean_environment() | one_thread,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
        script, *arguments = [str(part) for part in command]
        self.command = [str(ROOT / script), *arguments]
        self._folder = tempfile.TemporaryDirectory()
        self._files = [f"{self._folder.name}/{name}" for name in ("stdout", "stderr")]
        request = {
            "command": self.command, "environment": clean_environment() | environment, "folder": str(cwd),
            "stdout": self._files[0], "stderr": self._files[1], "cores": sorted(os.sched_getaffinity(0)),
        }  # fmt: skip
        server = Forked._server
        assert server.stdin is not None
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        self.pid = int(self._answer())

    def _answer(self) -> str:
        assert Forked._server is not None
        assert Forked._server.stdout is not None
        return Forked._server.stdout.readline()

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def wait(self) -> subprocess.CompletedProcess[str]:
        """Wait for its end. Returns its exit code, which is -N after signal N, and its output. Kills it after five minutes."""
        timer = threading.Timer(300, self.kill)
        timer.start()
        code = int(self._answer())
        timer.cancel()
        stdout, stderr = (Path(file).read_text() for file in self._files)
        self._folder.cleanup()
        return subprocess.CompletedProcess(self.command, code, stdout, stderr)


def run_forked(*command: Any, cwd: Path = Path("/tmp"), **environment: str) -> subprocess.CompletedProcess[str]:
    """Like `run_script`, but without the seconds of imports. For scripts that import no more than train.py does."""
    return Forked(*command, cwd=cwd, **environment).wait()


def clean_environment() -> dict[str, str]:
    """This process's environment without the variables that change how scripts find modules or are launched."""
    return {
        name: value
        for name, value in os.environ.items()
        if name != "PYTHONPATH" and not name.startswith(("ACCELERATE_", "MASTER_", "WORLD_SIZE", "RANK", "LOCAL_"))
    }


def assert_refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """Assert that the script ended with exit code 2 and one line of error that contains all `words`."""
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if not line.startswith("dlopen libcuda")]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0], lines[0]


@contextmanager
def s3_server(log: Path) -> Iterator[str]:
    """Run moto's S3 server on a free port of 127.0.0.1; yields its address. log: a file for its output."""
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"], stdout=stream, stderr=stream
        )
    try:
        deadline = time.monotonic() + 60
        while not (address := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()  # noqa: PT018
            time.sleep(0.05)
        yield address[0]
    finally:
        process.kill()
        process.wait()


def s3_client() -> Any:
    """boto3's S3 client, for the endpoint in the environment, which the fixture `s3` sets."""
    import boto3

    return boto3.client("s3")


def upload(folder: Path, url: str) -> str:
    """Upload all files of a folder below an s3:// URL with boto3; returns the URL."""
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    client = s3_client()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            client.upload_file(str(path), bucket, f"{prefix}/{path.relative_to(folder)}".lstrip("/"))
    return url


def without_progress(result: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    """The same result without the progress bars on stderr."""
    lines = result.stderr.replace("\r", "\n").splitlines()
    result.stderr = "\n".join(line for line in lines if line.strip() and "%|" not in line and "/s]" not in line)
    return result


class FakeTime:
    """Replaces a module's `time`. Time passes only in `sleep`."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def working_threads() -> set[threading.Thread]:
    """This process's threads without those that wait for the next slow read of storage.

    These begin when a read finds its bytes not in the page cache, which depends on the machine, and end by themselves.
    """
    return {thread for thread in threading.enumerate() if thread.name != "cropfeed-storage"}


def assert_ends(process: int, seconds: float = 30) -> None:
    """Wait until a killed process has ended. It may remain as a zombie until its parent waits for it."""
    deadline = time.monotonic() + seconds
    while psutil.pid_exists(process) and psutil.Process(process).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, f"process {process} still runs after {seconds} s"
        time.sleep(0.05)
