"""The entries of a manifest's shards. Those of a large manifest.json stay in the file, as a million dicts take 8 s and 0.8 GB.

A compiled function scans such a file. It accepts entries as the converter writes them, with any white space. If it meets anything
else, the file is read like any other JSON.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, BinaryIO, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from ..jit import jit

_CHUNK = 4 << 20  # bytes in memory at a time
# A shard's entry. A blank stands for any white space, S for a string of printable ASCII without escapes, N for a count, E for the
# comma or bracket after it.
_ENTRY = np.frombuffer(b' { "file" : "S" , "images" : N , "bytes" : N , "sha256" : "S" , "idx_sha256" : "S" } E', np.uint8)
_BLANK, _COUNT, _STRING, _END, _QUOTE, _ESCAPE, _COMMA, _CLOSE = b' NSE"\\,]'
_SHORTEST = 57  # bytes of an entry
_LIST = re.compile(rb'"shards"\s*:\s*(\[)(?=\s*\{)')
_PLACE = uuid.uuid4().hex  # the key of an object that stands for a list while the rest of the file is parsed
_COLUMNS = ("images", "bytes")

Columns = npt.NDArray[np.int64]
Entry = Mapping[str, Any]
T = TypeVar("T")


class Lazy(Generic[T]):
    """A sequence whose items are made when they are asked for: names of a million shards take 1 s and 0.1 GB."""

    def __init__(self, count: int, make: Callable[[int], T]) -> None:
        self._numbers, self._make = range(count), make

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, at: int) -> T:
        return self._make(self._numbers[at])

    def __iter__(self) -> Iterator[T]:
        return map(self._make, self._numbers)


class StoredEntries(Lazy[Entry]):
    """The entries of a split's shards in a file, which has to stay open.

    columns: (3, shards + 1): `images`, `bytes`, and where the entry begins in the file; at last, where the list ends.
    """

    def __init__(self, file: BinaryIO, columns: Columns) -> None:
        super().__init__(columns.shape[1] - 1, partial(_parse, file, columns[2]))
        self.columns = columns


Entries = list[Entry] | StoredEntries


def _parse(file: BinaryIO, starts: Columns, number: int) -> Entry:
    start, end = starts[number : number + 2].tolist()
    found: Entry = json.loads(os.pread(file.fileno(), end - start, start).strip(b" \t\r\n,]"))
    return found


def column(entries: Entries, name: str) -> Columns:
    """The `images` or `bytes` of all shards: int64 (shards,)."""
    if isinstance(entries, StoredEntries):
        return entries.columns[_COLUMNS.index(name), :-1]
    return np.array([entry[name] for entry in entries], np.int64)


def read_large(file: BinaryIO) -> Any:
    """The content of manifest.json, with `StoredEntries` in place of lists of shards; None if it has to be read in another way.

    file: local; it has to stay open. Raises ValueError if what is outside the lists is not JSON.
    """
    text: list[bytes] = []
    lists: list[StoredEntries] = []
    at = 0
    while found := _LIST.search(chunk := os.pread(file.fileno(), _CHUNK, at)):
        entries = _scan_list(file, at + found.end())
        if entries is None:
            return None
        text += [chunk[: found.start(1)], b'{"%s": %d}' % (_PLACE.encode(), len(lists))]
        lists.append(entries)
        at = int(entries.columns[2, -1])
    if len(chunk) == _CHUNK:
        return None
    return json.loads(b"".join([*text, chunk]), object_hook=lambda item: lists[item[_PLACE]] if _PLACE in item else item)


def _scan_list(file: BinaryIO, at: int) -> StoredEntries | None:
    """The entries of a list whose first one begins at `at`; None if there is anything else in the list."""
    columns = np.empty((3, os.fstat(file.fileno()).st_size // _SHORTEST + 1), np.int64)  # only what is written takes memory
    count = 0
    while True:
        chunk = os.pread(file.fileno(), _CHUNK, at)
        found, used = _scan(np.frombuffer(chunk + b"\0", np.uint8), at, _ENTRY, columns, count)
        if found == count:
            return None
        count, at = found, at + used
        if chunk[used - 1] == _CLOSE:
            return StoredEntries(file, columns[:, : count + 1])


@jit
def _scan(text: Any, start: Any, entry: Any, columns: Any, count: Any) -> Any:
    """Append entries to the first `count` of `columns`, up to the end of the list, or up to one that is cut off or not accepted.

    text: bytes of the file from `start` on, and a zero, which nothing accepts. Returns the new count, and how many bytes it took.
    """
    at = 0
    while True:
        columns[2, count] = start + at
        first, row = at, 0
        for wanted in entry:
            begin, number = at, np.int64(0)
            if wanted == _BLANK:
                while text[at] == 0x20 or 0x09 <= text[at] <= 0x0A or text[at] == 0x0D:
                    at += 1
            elif wanted == _STRING:
                while 0x20 <= text[at] <= 0x7E and text[at] != _QUOTE and text[at] != _ESCAPE:
                    at += 1
            elif wanted == _COUNT:
                while 0x30 <= text[at] <= 0x39:
                    number = 10 * number + np.int64(text[at]) - 0x30
                    at += 1
                if not 0 < at - begin < 19 or (text[begin] == 0x30 and at - begin > 1):
                    return count, first
                columns[row, count] = number
                row += 1
            elif text[at] == wanted or (wanted == _END and (text[at] == _COMMA or text[at] == _CLOSE)):
                at += 1
            else:
                return count, first
        count += 1
        if text[at - 1] == _CLOSE:
            columns[2, count] = start + at
            return count, at
