"""manifest.json: what a data set consists of."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..pixels.normalize import Floats, lighting_basis
from . import files
from .entries import StoredEntries, column, read_large

FORMAT = "cropfeed-shards"
VERSION = 2
_LARGE = 16 << 20  # bytes of a manifest.json whose shards stay in the file: it has more than 60,000

# What manifest.json must have. Keys: "NAME?" may be missing, "*" stands for every key. Values: a type; (schema, ...) is a list of
# that length, [schema] one of any length. Integers are counts; floats are finite.
_THREE = (float, float, float)
_SHARD = {"file": str, "images": int, "bytes": int, "sha256": str, "idx_sha256": str}
_BETON = {"file": str, "sha256": str, "settings": {"mode": str, "max_resolution": int | None}}
_SPLIT = {"images": int, "samples": str, "samples_sha256": str, "shards": [_SHARD], "beton?": _BETON, "fields?": [str]}
_STATISTICS = {
    "channel_mean": _THREE, "rgb_covariance": (_THREE, _THREE, _THREE), "mean_image": str, "mean_image_sha256": str,
}  # fmt: skip
_MANIFEST = {
    "profile": str, "classes": [str], "class_names?": {"*": str}, "splits": {"*": _SPLIT}, "statistics": _STATISTICS,
}  # fmt: skip
_known: ContextVar[dict[str, Any]] = ContextVar("manifests")  # path -> content, within `read_once`


class Manifest:
    """manifest.json, read and validated.

    format, version: "cropfeed-shards", 2. profile: how images are stored, see `convert.images`. conversion: the settings.
    classes: class folder names (wnids) in label order. class_names: class -> its name for people, only if the source has names
    (see `convert.names`). label_digits: number of digits in .cls files.
    splits: name -> {images, samples: file, samples_sha256, shards: [{file, images, bytes, sha256, idx_sha256}]}, and beton:
    {file, sha256, settings} if there is an FFCV file, and fields: extensions of further members of its samples, if there are any.
    statistics: of centre crops of training images: images (their number), channel_mean (3,) in 0..255, rgb_covariance (3, 3) for
    RGB in 0..1, its eigenvalues (3,) and eigenvectors (columns), mean_image: file, mean_image_sha256.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = files.absolute(str(root))
        path = files.join(self.root, "manifest.json")
        try:
            content = _content(path)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not valid JSON ({error})", "make the shards again") from error
        except UserError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            has_folder = files.is_remote(path) or files.is_folder(self.root)
            problem = f"{path}: not found" if has_folder else f"{self.root}: no such folder"
            held = [] if files.is_remote(path) else [entry.name for entry in files.list_folder(self.root)]
            if "conversion" in held:
                raise UserError(f"{self.root}: its conversion is not finished", "repeat the command that began it") from error
            if held:
                problem, command = f"{self.root}: holds no shards", f"cropfeed shards {self.root} --out {self.root}-shards"
                raise UserError(problem, f"if it holds images, make shards of them: {command}") from error
            raise UserError(problem, f"make shards first: cropfeed shards SRC --out {self.root}") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("version") != VERSION:
            raise UserError(f"{path}: not {FORMAT} version {VERSION}", "make the shards again with this version of Cropfeed")
        if problem := manifest_problem(content):
            raise UserError(f"{path}: is damaged ({problem})", "make the shards again")
        self.profile: str = content["profile"]
        self.classes: list[str] = content["classes"]
        self.class_names: dict[str, str] = content.get("class_names", {})
        self.splits: dict[str, dict[str, Any]] = content["splits"]
        self.statistics: dict[str, Any] = content["statistics"]
        hashes = {name: split["samples_sha256"] for name, split in self.splits.items()}  # of the checksums of all samples
        self.fingerprint = hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()[:16]

    def channel_mean(self) -> Floats:
        """float32 (3,), 0..255."""
        return np.array(self.statistics["channel_mean"], np.float32)

    def mean_image(self) -> Floats:
        """float32 (224, 224, 3), 0..255."""
        path = files.join(self.root, self.statistics["mean_image"])
        content = files.read(path)
        if hashlib.sha256(content).hexdigest() != self.statistics["mean_image_sha256"]:
            raise UserError(f"{path}: its SHA-256 is not the one in manifest.json", "make the shards again")
        try:
            image: Floats = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
        except Exception as error:  # NumPy's reader of headers raises many types
            raise UserError(f"{path}: is damaged ({error})", "make the shards again") from error
        if image.dtype != np.float32 or image.ndim != 3 or image.shape[2] != 3 or not np.isfinite(image).all():
            raise UserError(f"{path}: is damaged (not a float32 image)", "make the shards again")
        return image

    def lighting_basis(self) -> Floats:
        """float32 (3, 3), see `pixels.normalize.lighting_basis`."""
        return lighting_basis(self.statistics["rgb_covariance"])


@contextmanager
def read_once() -> Iterator[None]:
    """A context in which this thread reads each manifest.json once, as a large one takes time and memory."""
    before = _known.set({})
    try:
        yield
    finally:
        _known.reset(before)


def _content(path: str) -> Any:
    """The content of manifest.json, see `read_large`. Raises UserError, ValueError and RecursionError."""
    known = _known.get({})
    if path not in known:
        known[path] = _read(path)
    return known[path]


def _read(path: str) -> Any:
    if not files.is_remote(path) and os.path.exists(path) and os.path.getsize(path) > _LARGE:
        with files.explained(path):
            file: Any = open(path, "rb")  # noqa: SIM115 - it stays open for `StoredEntries`
        return read_large(file) or json.loads(files.read(path))
    text = files.read(path)
    if len(text) <= _LARGE:
        return json.loads(text)
    file = tempfile.TemporaryFile()  # noqa: SIM115
    file.write(text)
    file.flush()
    return read_large(file) or json.loads(text)


def manifest_problem(content: Any) -> str:
    """What is wrong with the content of manifest.json; "" if nothing is."""
    if problem := _mismatch(content, _MANIFEST, "its content"):
        return problem
    for name, split in content["splits"].items():
        if not split["shards"] and "beton" not in split:
            return f"splits.{name} has neither shards nor an FFCV file"
        if split["shards"] and int(column(split["shards"], "images").sum()) != split["images"]:
            return f"splits.{name}.images is not the sum over its shards"
    return ""


def _mismatch(value: Any, schema: Any, place: str) -> str:
    """How a JSON value deviates from a schema; "" if it does not. place: its name in messages."""
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return f"{place} is not an object"
        parts = [(name, kind) for key, kind in schema.items() for name in (value if key == "*" else [key])]
        inside = "" if schema is _MANIFEST else f"{place}."
        return next(filter(None, (_mismatch_at(value, name, kind, inside) for name, kind in parts)), "")
    if isinstance(value, StoredEntries) and schema == [_SHARD]:  # which has nothing else
        return ""
    if isinstance(schema, list | tuple):
        if not isinstance(value, list) or (isinstance(schema, tuple) and len(value) != len(schema)):
            return f"{place} is not a list" + (f" of {len(schema)}" if isinstance(schema, tuple) else "")
        return next(filter(None, (_mismatch(item, schema[0], f"{place}[{i}]") for i, item in enumerate(value))), "")
    if schema is float:
        is_finite = isinstance(value, int | float) and math.isfinite(value)
        return "" if is_finite else f"{place} is not a finite number"
    if not isinstance(value, schema) or isinstance(value, bool):
        return f"{place} is not {'a string' if schema is str else 'an integer'}"
    if isinstance(value, int) and not 0 <= value < 1 << 63:
        return f"{place} is {'negative' if value < 0 else 'too large'}"
    return ""


def _mismatch_at(value: Mapping[str, Any], name: str, schema: Any, inside: str) -> str:
    key = name.removesuffix("?")
    if key in value:
        return _mismatch(value[key], schema, inside + key)
    return f"{inside}{name} is missing" if key == name else ""
