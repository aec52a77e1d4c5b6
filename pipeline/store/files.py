"""Files by local path or fsspec URL (such as s3://bucket/key): range reads, listings, atomic writes.

Every function takes paths as strings. Storage errors (missing files, credentials, unknown protocols) become UserErrors. Storage
that does not answer is asked again, see `waiting`: remote storage always, local files when they are read.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import fsspec
from fsspec.callbacks import TqdmCallback
from fsspec.implementations.local import LocalFileSystem

from ..errors import UserError, install_command, writing
from ..progress import BYTES, progress_bar
from .waiting import REQUESTS, Limit, RangeReader, answer

PARTIAL = ".partial"  # suffix of files that are still being written; their names begin with a dot
CHUNK = 8 << 20  # bytes of a request in `read_chunks`
_PART, _SLOW = 100 << 20, 1e6  # bytes that an upload sends without a report; bytes per second of a slow link
_REQUESTS = 8  # requests at a time, as object stores limit the throughput of each one
# Object stores list an object only after its upload is complete. Other file systems list a file while it is being written.
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "oss", "memory"}

NO_RANGES = "a web server without range requests, which sends whole files"
BROKEN = -1
_limit = Limit(REQUESTS)
T = TypeVar("T")


class Entry(NamedTuple):
    """A file or folder in a folder, or what a symbolic link there leads to.

    name: without the folder. bytes: size of a file; BROKEN for a symbolic link that leads nowhere.
    """

    name: str
    is_folder: bool
    bytes: int


def is_remote(path: str) -> bool:
    """Whether `path` is a URL of anything but local files."""
    return "://" in path and not path.startswith(("file://", "local://"))


def join(folder: str, *names: str) -> str:
    return "/".join([folder.rstrip("/"), *names])


def absolute(path: str) -> str:
    """An absolute local path, which is valid in other processes, too; or a URL without a trailing slash."""
    return path.rstrip("/") if is_remote(path) else os.path.abspath(path.removeprefix("file://").removeprefix("local://"))


def as_utf8(name: str) -> str:
    """A local file's name as proper UTF-8, whatever the locale: bytes that are no UTF-8 become \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def read(path: str, start: int = 0, count: int | None = None) -> bytes:
    """Read `count` bytes from `start` on; all, if None; fewer if the file ends earlier."""
    with explained(path):
        if not is_remote(path):  # fsspec would take 0.2 ms
            return answer(path, lambda: _read_local(path, start, count))
        end = None if count is None else start + count
        content: bytes = _ask(path, lambda system, target: system.cat_file(target, start=start or None, end=end))
        if count is not None and len(content) > count:
            raise OSError(NO_RANGES)
        return content


def _read_local(path: str, start: int, count: int | None) -> bytes:
    with open(absolute(path), "rb") as stream:
        stream.seek(start)
        return stream.read(-1 if count is None else count)


def size(path: str) -> int:
    """The current size of a file, bytes."""

    def find(system: Any, target: str) -> int:
        system.invalidate_cache()  # fsspec caches listings, which may be out of date
        return int(system.info(target)["size"])

    with explained(path):
        return _ask(path, find)


def read_chunks(path: str, count: int) -> Iterator[bytes]:
    """The first `count` bytes of a file, as chunks in order. Several chunks are requested at a time."""
    for first in range(0, count, CHUNK * _REQUESTS):
        with explained(path):
            found = _ask(path, partial(_read_some, first, count), min(_REQUESTS, -(-(count - first) // CHUNK)))
        yield from found


def _read_some(first: int, count: int, system: Any, target: str) -> list[bytes]:
    """The next chunks of the first `count` bytes of a file, from `first` on."""
    starts = list(range(first, min(first + CHUNK * _REQUESTS, count), CHUNK))
    ends = [min(start + CHUNK, count) for start in starts]
    found: list[Any] = system.cat_ranges([target] * len(starts), starts, ends)
    for start, end, chunk in zip(starts, ends, found, strict=True):
        if isinstance(chunk, Exception):
            raise chunk
        if len(chunk) != end - start:
            raise OSError(NO_RANGES if len(chunk) > end - start else f"ends at {start + len(chunk)} instead of {count} bytes")
    return found


@contextmanager
def open_binary(path: str) -> Iterator[Any]:
    """A seekable binary file for reading."""
    with explained(path):
        if is_remote(path):
            yield io.BufferedReader(RangeReader(lambda start, count: read(path, start, count), size(path)), CHUNK)
            return
        with open(absolute(path), "rb") as stream:
            yield stream


def exists(path: str) -> bool:
    with explained(path):
        return bool(_ask(path, lambda system, target: system.exists(target)))


def is_folder(path: str) -> bool:
    with explained(path):
        return bool(_ask(path, lambda system, target: system.isdir(target)))


def list_folder(folder: str, hidden: bool = False) -> list[Entry]:
    """The entries of a folder, sorted by name. A missing folder has none. Symbolic links are followed. hidden: also those whose
    names begin with a dot."""
    with explained(folder):
        if not is_remote(folder):  # for fsspec, a link to a folder is no folder
            try:
                with os.scandir(absolute(folder)) as scanned:
                    entries = [_local_entry(entry) for entry in scanned if hidden or not entry.name.startswith(".")]
                return sorted(entries, key=lambda entry: os.fsencode(entry.name))  # the same order in every locale
            except FileNotFoundError:
                return []

        def find(system: Any, target: str) -> Any:
            system.invalidate_cache()
            return system.ls(target, detail=True)

        try:
            found = _ask(folder, find)
        except FileNotFoundError:
            return []
        entries = [Entry(i["name"].rstrip("/").rsplit("/", 1)[1], i["type"] == "directory", i["size"] or 0) for i in found]
        return sorted(entry for entry in entries if entry.name and (hidden or not entry.name.startswith(".")))


def _local_entry(entry: os.DirEntry[str]) -> Entry:
    try:
        return Entry(entry.name, entry.is_dir(), entry.stat().st_size)
    except OSError:  # a link to nothing, or in a loop
        if not entry.is_symlink():
            raise
        return Entry(entry.name, False, BROKEN)


def remove(path: str) -> None:
    """Remove a file, if it exists."""
    with explained(path), contextlib.suppress(FileNotFoundError):
        _ask(path, lambda system, target: system.rm_file(target))


@contextmanager
def atomic_write(path: str, label: str = "") -> Iterator[Path]:
    """A context with a local scratch file to write. It becomes `path` when the block ends, and is removed if the block raises.

    Until then, readers of `path` see the old file, or none. Folders are created as needed. label: of a progress bar for the
    upload of a large file; without it there is no bar.
    """
    with explained(path):
        system, target = _system(path)
        local = isinstance(system, LocalFileSystem)
        folder = Path(target).parent if local else Path(tempfile.gettempdir())
        with writing(path if local else folder):
            folder.mkdir(parents=True, exist_ok=True)
        scratch = folder / f".{target.rsplit('/', 1)[1]}.{uuid.uuid4().hex}{PARTIAL}"
    with writing(path if local else scratch):
        try:
            yield scratch
            if local:
                os.replace(scratch, target)
                return
            with explained(path):
                _upload(path, scratch, label)
        finally:
            scratch.unlink(missing_ok=True)


class _Moving(TqdmCallback):
    """A bar of an upload that knows when it last moved."""

    moved = 0.0

    def call(self, *arguments: Any, **options: Any) -> None:
        self.moved = time.monotonic()
        super().call(*arguments, **options)


def _upload(path: str, scratch: Path, label: str) -> None:
    """Upload a local file to a URL. label: see `atomic_write`."""
    shown = _Moving({"desc": label, "disable": not label} | BYTES, tqdm_cls=progress_bar)
    slack = min(scratch.stat().st_size, _PART) / _SLOW

    def put(suffix: str) -> None:
        answer(path, lambda: system.put_file(str(scratch), target + suffix, callback=shown), lambda: shown.moved, slack)

    system, target = _system(path)
    protocols = {system.protocol} if isinstance(system.protocol, str) else {*system.protocol}
    if protocols & _OBJECT_STORES:
        put("")
        return
    _ask(path, lambda system, target: system.makedirs(target.rsplit("/", 1)[0], exist_ok=True))
    put(PARTIAL)
    _ask(path, lambda system, target: system.mv(target + PARTIAL, target))


def write(path: str, content: bytes) -> None:
    """Write a file atomically."""
    with atomic_write(path) as scratch:
        scratch.write_bytes(content)


def _ask(path: str, call: Callable[[Any, str], T], requests: int = 1) -> T:
    """call(file system, its name of the path); for remote storage, see `answer`. requests: that it makes at a time."""
    if is_remote(path):
        with _limit.of(requests):
            return answer(path, lambda: call(*_system(path)))
    return call(*_system(path))


def _system(path: str) -> tuple[Any, str]:
    system, target = fsspec.core.url_to_fs(path)
    return system, target


@contextmanager
def explained(path: str) -> Iterator[None]:
    """Turn the many exceptions of fsspec's back ends into one-line UserErrors that name the path."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path}: not found") from error
    except ImportError as error:  # fsspec's message names the package to install
        raise UserError(f"{path}: {error}", install_command("s3") if "s3" in str(error) else "") from error
    except Exception as error:
        if isinstance(error, PermissionError) and not is_remote(path):
            raise UserError(f"{path}: permission denied for user ID {os.geteuid()}", "ask its owner for access") from error
        if isinstance(error, OSError) and not is_remote(path):
            raise UserError(f"{path}: cannot be read or written ({error.strerror or error})") from error
        raise UserError(f"{path}: cannot be reached ({type(error).__name__}: {error})") from error


def sync(stream: Any) -> None:
    """Write an open file to its disk, if its file system can do that."""
    try:
        os.fsync(stream.fileno())
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise


def sha256(path: str, label: str = "") -> str:
    """The SHA-256 of a file's content, in hex. label: of a bar, for large files; none without it."""
    digest = hashlib.sha256()
    total = size(path) if label else None
    with open_binary(path) as stream, progress_bar(total=total, desc=label, disable=not label, **BYTES) as bar:
        while block := stream.read(1 << 22):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def remove_folder(path: str) -> None:
    """Remove a folder with everything in it, if it exists."""
    with explained(path), contextlib.suppress(FileNotFoundError):
        _ask(path, lambda system, target: system.rm(target, recursive=True))


def remove_partials(folder: str, seconds: float) -> None:
    """Remove partial files of killed writers in and below a local folder, if they were last written `seconds` ago or earlier.

    Object stores do not keep aborted uploads.
    """
    for path in [] if is_remote(folder) else Path(folder).rglob(f".*{PARTIAL}"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime >= seconds:
                path.unlink()
