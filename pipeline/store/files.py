"""Files by local path or fsspec URL (s3://bucket/key and the like): range reads, listings, atomic writes.

Every function takes paths as strings. Storage errors (missing files, credentials, unknown protocols) become UserErrors.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem

from ..errors import UserError, install_command

PARTIAL = ".partial"  # suffix of files that are still being written; their names begin with a dot
CHUNK = 8 << 20  # bytes
_REQUESTS = 8  # at a time: object stores limit the throughput of each request
# Object stores show an object only after its upload is complete; other file systems show a file while it grows.
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "oss", "memory"}


class Entry(NamedTuple):
    """A file or folder in a folder. name: without the folder. bytes: size of a file."""

    name: str
    is_folder: bool
    bytes: int


def is_remote(path: str) -> bool:
    """Whether `path` is a URL of anything but local files."""
    return "://" in path and not path.startswith(("file://", "local://"))


def join(folder: str, *names: str) -> str:
    return "/".join([folder.rstrip("/"), *names])


def absolute(path: str) -> str:
    """A local path made absolute, so that it holds in other processes; a URL unchanged, but without a trailing slash."""
    return path.rstrip("/") if is_remote(path) else os.path.abspath(path.removeprefix("file://").removeprefix("local://"))


def read(path: str, start: int = 0, count: int | None = None) -> bytes:
    """`count` bytes from `start` on (all, if None). Fewer only if the file ends before."""
    with _explained(path):
        if not is_remote(path):  # avoids the 0.2 ms that fsspec takes
            with open(absolute(path), "rb") as stream:
                stream.seek(start)
                return stream.read(-1 if count is None else count)
        system, target = _system(path)
        content: bytes = system.cat_file(target, start=start or None, end=None if count is None else start + count)
        return content


def size(path: str) -> int:
    """The current size of a file, bytes."""
    with _explained(path):
        system, target = _system(path)
        system.invalidate_cache()  # an earlier listing may be out of date
        return int(system.info(target)["size"])


def read_chunks(path: str, count: int) -> Iterator[bytes]:
    """The first `count` bytes of a file, in order and in chunks, several of which are requested at a time."""
    with _explained(path):
        system, target = _system(path)
        for first in range(0, count, CHUNK * _REQUESTS):
            starts = list(range(first, min(first + CHUNK * _REQUESTS, count), CHUNK))
            ends = [min(start + CHUNK, count) for start in starts]
            found = system.cat_ranges([target] * len(starts), starts, ends)
            for start, end, chunk in zip(starts, ends, found, strict=True):
                if isinstance(chunk, Exception):
                    raise chunk
                if len(chunk) != end - start:  # a web server without range requests sends the whole file
                    raise OSError(f"asked for {end - start} bytes from {start} on, got {len(chunk)}")
                yield chunk


@contextmanager
def open_binary(path: str) -> Iterator[Any]:
    """A seekable binary file for reading."""
    with _explained(path):
        system, target = _system(path)
        with system.open(target, "rb") as stream:
            yield stream


def exists(path: str) -> bool:
    with _explained(path):
        system, target = _system(path)
        return bool(system.exists(target))


def is_folder(path: str) -> bool:
    with _explained(path):
        system, target = _system(path)
        return bool(system.isdir(target))


def list_folder(folder: str) -> list[Entry]:
    """The entries of a folder by name, without hidden ones. A missing folder has none."""
    with _explained(folder):
        system, target = _system(folder)
        system.invalidate_cache()
        try:
            found = system.ls(target, detail=True)
        except FileNotFoundError:
            return []
        entries = [Entry(i["name"].rstrip("/").rsplit("/", 1)[1], i["type"] == "directory", i["size"] or 0) for i in found]
        return sorted(entry for entry in entries if entry.name and not entry.name.startswith("."))


def remove(path: str) -> None:
    """Remove a file, if it exists."""
    with _explained(path):
        system, target = _system(path)
        try:
            system.rm_file(target)
        except FileNotFoundError:
            return


@contextmanager
def atomic_write(path: str) -> Iterator[Path]:
    """Gives a local scratch file to write. It becomes `path` when the block ends, and is removed if the block raises.

    Readers of `path` see the old file, or none, until the new one is complete. Folders are created as needed.
    """
    with _explained(path):
        system, target = _system(path)
        local = isinstance(system, LocalFileSystem)
        folder = Path(target).parent if local else Path(tempfile.gettempdir())
        folder.mkdir(parents=True, exist_ok=True)
        scratch = folder / f".{target.rsplit('/', 1)[1]}.{uuid.uuid4().hex}{PARTIAL}"
    try:
        yield scratch
        with _explained(path):
            if local:
                os.replace(scratch, target)
            elif set(_protocols(system)) & _OBJECT_STORES:
                system.put_file(str(scratch), target)
            else:
                system.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
                system.put_file(str(scratch), target + PARTIAL)
                system.mv(target + PARTIAL, target)
    finally:
        scratch.unlink(missing_ok=True)


def write(path: str, content: bytes) -> None:
    """Write a file atomically."""
    with atomic_write(path) as scratch:
        scratch.write_bytes(content)


def _system(path: str) -> tuple[Any, str]:
    system, target = fsspec.core.url_to_fs(path)
    return system, target


def _protocols(system: Any) -> tuple[str, ...]:
    return (system.protocol,) if isinstance(system.protocol, str) else tuple(system.protocol)


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """Turn the dozen exceptions of fsspec's back ends into one-line UserErrors that name the path."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path}: not found") from error
    except ImportError as error:  # fsspec's message names the package to install
        raise UserError(f"{path}: {error}", install_command("s3") if "s3" in str(error) else "") from error
    except Exception as error:
        raise UserError(f"{path}: cannot be reached ({type(error).__name__}: {error})") from error


def sha256(path: str) -> str:
    """The SHA-256 of a file's content, in hex."""
    digest = hashlib.sha256()
    with open_binary(path) as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def remove_folder(path: str) -> None:
    """Remove a folder with everything in it, if it exists."""
    with _explained(path):
        system, target = _system(path)
        with contextlib.suppress(FileNotFoundError):
            system.rm(target, recursive=True)


def remove_partials(folder: str, seconds: float) -> None:
    """Remove the partial files of killed writers in and below a local folder, if not written to for `seconds`.

    Object stores keep nothing of an aborted upload.
    """
    for path in [] if is_remote(folder) else Path(folder).rglob(f".*{PARTIAL}"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime >= seconds:
                path.unlink()
