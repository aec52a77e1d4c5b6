"""Reading and checks of samples.npy: a wrong number there would give other images or labels, or none."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..errors import UserError
from . import files
from .tar import SAMPLE, Samples
from .waiting import answer

Ints = npt.NDArray[np.int64]
_READ = 64 << 20  # bytes of the largest samples.npy that is read. A larger one is mapped; ImageNet's has 41 MB
_AT_ONCE = 1 << 20  # records in memory at a time


def load_samples(path: str, local: Path) -> Samples:
    """The records in samples.npy. path: its name in messages. local: the file."""
    with files.explained(path):
        try:
            samples = answer(path, lambda: _read_or_map(local))
        except (OSError, UserError):
            raise
        except Exception as error:  # NumPy's reader of headers raises many types
            raise UserError(f"{path}: cannot be read ({error})", "make the shards again") from error
    if samples.dtype != SAMPLE or samples.ndim != 1:
        raise UserError(f"{path}: does not hold records of samples", "make the shards again")
    return samples


def _read_or_map(file: Path) -> Samples:
    """An array in a .npy file: read, as the kernel kills the process if a mapped file is shortened. A large one is mapped if its
    file system allows that."""
    if file.stat().st_size > _READ:
        with suppress(OSError):
            return np.lib.format.open_memmap(file, mode="r")
    with file.open("rb") as stream:
        samples: Samples = np.lib.format.read_array(stream, allow_pickle=False)
        return samples


def samples_problem(samples: Samples, classes: int, ends: Ints, sizes: Ints, first: int = 0) -> str:
    """What is wrong with `SAMPLE` records, of consecutive samples from `first` on; "" if nothing is.

    classes: their number. ends, sizes: of the shards, in samples and bytes, int64 (shards,); empty if there are only FFCV files.
    """
    for start in range(0, len(samples), _AT_ONCE):
        part = samples[start : start + _AT_ONCE]
        for name, is_bad in _out_of_range(part, classes, ends, sizes, first + start):
            if is_bad.any():
                at = int(is_bad.argmax())
                return f"the {name} of sample {first + start + at} is out of range ({part[name][at]})"
    return ""


def _out_of_range(
    samples: Samples, classes: int, ends: Ints, sizes: Ints, first: int
) -> Iterator[tuple[str, npt.NDArray[np.bool_]]]:
    """Fields, and which records have a wrong value there."""
    yield "label", (samples["label"] < 0) | (samples["label"] >= classes)
    for name in ("bytes", "height", "width"):
        yield name, samples[name] == 0
    if len(ends):
        shards = np.searchsorted(ends, np.arange(first, first + len(samples)), side="right")
        yield "shard", samples["shard"] != shards
        limits = sizes[shards].astype(np.uint64)
        yield "offset", samples["offset"] > limits
        yield "bytes", samples["bytes"] > limits - samples["offset"]


class BackgroundCheck:
    """Runs checks of a file in a thread, one after another until one returns a problem.

    problem: that problem, or "". is_running: whether the checks have not ended.
    """

    def __init__(self, path: str, checks: Sequence[Callable[[], str]]) -> None:
        self.problem, self.is_running = "", True
        self._path, self._checks = path, checks
        self._thread = threading.Thread(target=self._run, name="cropfeed-check", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Raise UserError if the file is damaged."""
        self._thread.join()
        if self.problem:
            raise UserError(self.problem, "make the shards again")

    def _run(self) -> None:
        try:
            found = next(filter(None, (check() for check in self._checks)), "")
            self.problem = f"{self._path}: {found}" if found else ""
        except UserError as error:
            self.problem = str(error)
        finally:
            self.is_running = False


def hash_problem(path: str, sha256: str) -> str:
    return "" if files.sha256(path) == sha256 else "its SHA-256 is not the one in manifest.json"
