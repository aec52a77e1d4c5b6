"""Local copies of remote files, within a size limit, shared by all processes of a host.

The cache folder:

    SHA256                  a complete file with verified content; its modification time is that of its last use
    .SHA256.BYTES.partial   a running download, locked by its process; BYTES is its final size
    .lock                   locked while files are counted, added or removed

Files are named by the hash of their content, so several data sets can share a folder. Locks are made with flock, and the kernel
releases them when a process dies. An unlocked partial file is therefore left over from a killed process; the next download
removes it. The disk space of an evicted file is freed when the last reader closes it. Readers open a file for one read at a time
and do not map it.
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ..errors import UserError
from . import files

GIGABYTE = 10**9
FREE_SHARE = 0.8  # the default limit, as a fraction of the free disk space
_FILE = re.compile(r"[0-9a-f]{64}")
_PARTIAL = re.compile(r"\.([0-9a-f]{64})\.([0-9]+)\.partial")
_TOUCH_S, _POLL_S, _RECOUNT_S = 1.0, 0.02, 1.0
Report = Callable[[int], object]


class StoppedError(Exception):
    """A download was stopped by another thread."""


class _File(NamedTuple):
    used: float
    bytes: int
    path: Path


class _Contents(NamedTuple):
    """files: complete ones. running: SHA-256 -> partial file, of each running download. reserved: bytes of all running downloads
    when complete."""

    files: list[_File]
    running: dict[str, Path]
    reserved: int


@dataclass(frozen=True)
class ShardCache:
    """A cache in `folder`, which is created as needed. limit: maximum size of files and running downloads together, bytes."""

    folder: Path
    limit: int

    def path(self, sha256: str) -> Path:
        """Path of a file, if the cache holds it."""
        return self.folder / sha256

    def check(self, url: str, bytes: int) -> None:
        """Raise UserError for a file larger than the cache."""
        if bytes > self.limit:
            raise UserError(
                f"{url}: its {_gb(bytes)} do not fit into the cache {self.folder} of {_gb(self.limit)}",
                "raise `cache_gb` (CROPFEED_CACHE_GB)",
            )

    def open(
        self, url: str, bytes: int, sha256: str, stop: threading.Event | None = None, report: Report = lambda count: None
    ) -> FileIO:
        """The local copy, downloaded if needed, open for reading. It stays readable even if it is evicted.

        bytes, sha256: from the manifest. Raises UserError if the file is missing, has other content, or does not fit into the
        cache; StoppedError soon after another thread sets `stop`. report: called with the number of newly downloaded bytes.
        """
        self.check(url, bytes)
        stop = stop or threading.Event()
        try:
            while (found := self._open_complete(bytes, sha256)) is None:
                if stop.is_set():
                    raise StoppedError(url)
                with self._reserved(url, bytes, sha256) as partial:
                    if partial is not None:
                        return self._download(url, bytes, sha256, *partial, stop, report)
        except OSError as error:
            raise UserError(
                f"{self.folder}: the cache cannot be used ({error})", "give another `cache` (CROPFEED_CACHE) or less `cache_gb`"
            ) from error
        return found

    def open_pinned(self, url: str, bytes: int, sha256: str, report: Report = lambda count: None) -> FileIO:
        """Like `open`, but the file is not evicted until the returned stream is closed: for files that stay mapped."""
        while True:
            stream = self.open(url, bytes, sha256, report=report)
            fcntl.flock(stream, fcntl.LOCK_SH)
            if os.fstat(stream.fileno()).st_nlink:
                return stream
            stream.close()  # evicted before it was locked

    def _open_complete(self, bytes: int, sha256: str) -> FileIO | None:
        """The file, marked as used; None if it does not exist in its full size."""
        try:
            stream = FileIO(self.path(sha256))
        except FileNotFoundError:
            return None
        status = os.fstat(stream.fileno())
        if status.st_size != bytes:
            stream.close()
            return None
        if abs(time.time() - status.st_mtime) > _TOUCH_S:  # not for every read: there are thousands per second
            os.utime(stream.fileno())
        return stream

    @contextmanager
    def _locked_folder(self) -> Iterator[None]:
        """Exclude other processes from counting, adding and removing files."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(lock, fcntl.LOCK_UN)

    @contextmanager
    def _reserved(self, url: str, bytes: int, sha256: str) -> Iterator[tuple[Path, BinaryIO] | None]:
        """An empty, locked partial file, with its size reserved in the cache; or None, after waiting for another download, if
        that is of the same file or takes the space.
        """
        with self._locked_folder():
            path = self.path(sha256)
            if path.exists() and path.stat().st_size != bytes:
                path.unlink()  # damaged
            contents = self._contents()
            obstacle = contents.running.get(sha256)
            wanted = obstacle is None and not path.exists()
            if wanted and not self._evict_for(contents, url, bytes):
                wanted, obstacle = False, next(iter(contents.running.values()))
            if wanted:
                partial = self.folder / f".{sha256}.{bytes}.partial"
                stream = partial.open("wb")
                fcntl.flock(stream, fcntl.LOCK_EX)
        if not wanted:
            _wait_for(obstacle)
            yield None
            return
        with stream:
            try:
                yield partial, stream
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
            finally:  # closing alone does not unlock it if a forked child process has it open
                fcntl.flock(stream, fcntl.LOCK_UN)

    def _contents(self) -> _Contents:
        """The content of the folder, after removing unlocked partial files. Call it within `_locked_folder`."""
        contents = _Contents([], {}, 0)
        for entry in os.scandir(self.folder):
            path = Path(entry.path)
            if _FILE.fullmatch(entry.name):
                status = entry.stat()
                contents.files.append(_File(status.st_mtime, status.st_size, path))
            elif (match := _PARTIAL.fullmatch(entry.name)) and not _remove_unlocked(path):
                contents.running[match[1]] = path
                contents = contents._replace(reserved=contents.reserved + int(match[2]))
        return contents

    def _evict_for(self, contents: _Contents, url: str, bytes: int) -> bool:
        """Evict the least recently used files until `bytes` fit. Returns False if running downloads must end first. Call it
        within `_locked_folder`.
        """
        surplus = sum(file.bytes for file in contents.files) + contents.reserved + bytes - self.limit
        for file in sorted(contents.files):
            if surplus <= 0:
                break
            if _remove_unlocked(file.path):
                surplus -= file.bytes
        if surplus > 0 and not contents.running:
            raise UserError(
                f"{url}: its {_gb(bytes)} do not fit into the cache {self.folder} of {_gb(self.limit)} beside the "
                f"files in use; {_gb(surplus)} are missing",
                "raise `cache_gb` (CROPFEED_CACHE_GB)",
            )
        return surplus <= 0

    def _download(
        self, url: str, bytes: int, sha256: str, partial: Path, stream: BinaryIO, stop: threading.Event, report: Report
    ) -> FileIO:
        """Fill the partial file, verify it and rename it; returns it open for reading."""
        found = files.size(url)
        if found != bytes:
            raise UserError(f"{url}: has {found} bytes, manifest.json says {bytes}", "make the shards again")
        for _ in range(2):  # a wrong checksum may come from the transfer: try twice
            stream.seek(0)
            digest = hashlib.sha256()
            for chunk in files.read_chunks(url, bytes):
                if stop.is_set():
                    raise StoppedError(url)
                stream.write(chunk)
                digest.update(chunk)
                report(len(chunk))
            if digest.hexdigest() == sha256:
                break
        else:
            raise UserError(f"{url}: its SHA-256 is not the one in manifest.json", "make the shards again")
        stream.flush()
        files.sync(stream)  # a power failure must not leave a file of the right size without content
        with self._locked_folder():
            os.replace(partial, self.path(sha256))
            fcntl.flock(stream, fcntl.LOCK_UN)  # otherwise it would look pinned
            return FileIO(self.path(sha256))


def choose_cache(folder: str | Path | None = None, gigabytes: float | None = None) -> ShardCache:
    """The cache in `folder` with a limit of `gigabytes` (10^9 bytes).

    The defaults are $CROPFEED_CACHE and $CROPFEED_CACHE_GB; without these, ~/.cache/cropfeed and 80 % of the free disk space
    there. The space of files that the cache already holds counts as free.
    """
    path = Path(folder or os.environ.get("CROPFEED_CACHE") or "~/.cache/cropfeed").expanduser().absolute()
    text = str(gigabytes) if gigabytes is not None else os.environ.get("CROPFEED_CACHE_GB", "")
    if not text:
        return ShardCache(path, _default_limit(path))
    try:
        limit = float(text) * GIGABYTE
    except ValueError:
        limit = math.nan
    if not 1 <= limit < math.inf:
        raise UserError(f"`cache_gb` (CROPFEED_CACHE_GB) must be a positive number of gigabytes, not {text}")
    return ShardCache(path, int(limit))


def _default_limit(folder: Path) -> int:
    held = 0
    for path in folder.glob("*"):
        with suppress(FileNotFoundError):  # evicted meanwhile
            held += path.stat().st_size
    exists = next(place for place in (folder, *folder.parents) if place.exists())
    return int(FREE_SHARE * (shutil.disk_usage(exists).free + held))


def _gb(bytes: int) -> str:
    return f"{bytes / GIGABYTE:.3g} GB"


def _remove_unlocked(path: Path) -> bool:
    """Remove a file unless it is locked (a running download or a pinned file). Returns whether it was removed."""
    with path.open("rb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        path.unlink()
        return True


def _wait_for(partial: Path | None) -> None:
    """Wait until a download has ended, but at most `_RECOUNT_S`: its process may have died, and the caller has to check again."""
    deadline = time.monotonic() + _RECOUNT_S
    while partial is not None and partial.exists() and time.monotonic() < deadline:
        time.sleep(_POLL_S)
