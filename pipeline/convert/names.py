"""Names of classes that a source has beside its images. The manifest stores them; the shards do not depend on them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from ..store import files

_ABOVE = 3  # Kaggle's images are in ILSVRC/Data/CLS-LOC, its LOC_synset_mapping.txt is beside ILSVRC
_JSON = "expected {class: name}, or a list of names in label order"
_LINES = "expected lines of one kind: n01440764 tench, class TAB name, or names alone in label order"


def find_names(src: str, classes: Sequence[str]) -> dict[str, str]:
    """Class -> name, from the first of these files that exists; empty without one. Raises UserError for a damaged file.

    SRC/classes.json        {class: name}, or a list of names in label order
    SRC/classes.txt         lines `n01440764 tench` or `class<TAB>name`, or names alone in label order
    LOC_synset_mapping.txt  Kaggle's: lines `n01440764 tench, Tinca tinca`; in SRC or up to three folders above a local SRC

    Only the first of several lemmas is used. Names of classes that the source lacks are left out. A list that consists of the
    class folders' own names gives no names.
    """
    for name, read in (("classes.json", _json), ("classes.txt", _lines)):
        if files.exists(path := files.join(src, name)):
            return _by_class(path, read(path), classes)
    above = [] if files.is_remote(src) else [str(folder) for folder in Path(src).absolute().parents[:_ABOVE]]
    for folder in (src, *above):
        if files.exists(path := files.join(folder, "LOC_synset_mapping.txt")):
            return _by_class(path, _lines(path, ordered=False), classes)
    return {}


def _by_class(path: str, names: dict[str, str] | list[str], classes: Sequence[str]) -> dict[str, str]:
    if isinstance(names, list):
        if set(names) <= set(classes) or set(classes) <= set(names):
            return {}
        if len(names) != len(classes):
            raise UserError(
                f"{path}: has {len(names)} names, the images have {len(classes)} classes",
                "give one name for each class folder, in sorted order, or lines of class TAB name",
            )
        names = dict(zip(classes, names, strict=True))
    return {name: names[name] for name in classes if name in names}


def _json(path: str) -> dict[str, str] | list[str]:
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})", _JSON) from error
    if not isinstance(content, dict | list):
        raise UserError(f"{path}: is neither an object nor a list", _JSON)
    for name in content.values() if isinstance(content, dict) else content:
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{path}: {json.dumps(name)[:40]} is not a name", _JSON)
    if isinstance(content, dict):
        return {key: _clean(name) for key, name in content.items()}
    return [_clean(name) for name in content]


def _lines(path: str, ordered: bool = True) -> dict[str, str] | list[str]:
    """ordered: whether the lines may be names alone."""
    by_class: dict[str, str] = {}
    in_order: list[str] = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not (line := line.strip()):
            continue
        if found := re.fullmatch(r"([^\t]+)\t+(.+)|(n\d{8}) +([^,]+).*", line):
            by_class[(found[1] or found[3]).strip()] = _clean(found[2] or found[4])
        else:
            in_order.append(_clean(line))
        if in_order and (by_class or not ordered):
            raise UserError(f"{path}: line {number} is {line[:40]!r}", _LINES)
    return by_class or in_order


def read_text(path: str) -> str:
    """A text file, UTF-8 with or without a byte order mark."""
    content = files.read(path)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}: line {line} is not UTF-8", "save it as UTF-8") from error


def _clean(name: str) -> str:
    return " ".join(name.split())
