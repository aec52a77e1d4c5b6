"""The entries of a manifest's shards. Those of a large manifest.json stay in the file, as a million dicts take 8 s and 0.8 GB.

A compiled function scans such a file. It accepts entries as the converter writes them, with any white space. If it meets anything
else, the file is read like any other JSON.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO, overload

import numpy as np
import numpy.typing as npt

from ..jit import jit

_CHUNK = 4 << 20  # bytes in memory at a time
# A shard's entry. A blank stands for any white space, S for a string of printable ASCII without escapes, N for a count.
_ENTRY = np.frombuffer(b' { "file" : "S" , "images" : N , "bytes" : N , "sha256" : "S" , "idx_sha256" : "S" } ', np.uint8)
_BLANK, _COUNT, _STRING, _QUOTE, _ESCAPE, _COMMA, _CLOSE = b' NS"\\,]'
_SHORTEST = 57  # bytes of an entry
_LIST = re.compile(rb'"shards"\s*:\s*\[(?=\s*\{)')
_MORE, _END, _OTHER = 0, 1, 2  # where a scan stopped: at the end of its bytes, at the end of the list, at something else
_COLUMNS = ("images", "bytes")

Columns = npt.NDArray[np.int64]


class StoredEntries(Sequence[Mapping[str, Any]]):
    """The entries of a split's shards in a file. Each is parsed when it is asked for.

    columns: (3, shards): `images`, `bytes`, and where the entry begins in the file. end: where the last one ends.
    """

    def __init__(self, file: BinaryIO, columns: Columns, end: int) -> None:
        self._file, self._columns, self._end = file, columns, end

    def __len__(self) -> int:
        return self._columns.shape[1]

    @overload
    def __getitem__(self, at: int) -> Mapping[str, Any]: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Mapping[str, Any]]: ...
    def __getitem__(self, at: int | slice) -> Mapping[str, Any] | Sequence[Mapping[str, Any]]:
        number = range(len(self))[at]
        if isinstance(number, range):
            return [self[one] for one in number]
        start, end = [*self._columns[2, number : number + 2].tolist(), self._end][:2]
        text = os.pread(self._file.fileno(), end - start, start)
        found: Mapping[str, Any] = json.loads(text.strip(b" \t\r\n,"))
        return found

    def column(self, name: str) -> Columns:
        return self._columns[_COLUMNS.index(name)]


def column(entries: Sequence[Mapping[str, Any]], name: str) -> Columns:
    """The `images` or `bytes` of all shards: int64 (shards,)."""
    if isinstance(entries, StoredEntries):
        return entries.column(name)
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
        text += [chunk[: found.end()], b"%d" % len(lists)]
        lists.append(entries)
        at = entries._end
    if len(chunk) == _CHUNK:
        return None
    content = json.loads(b"".join([*text, chunk]))
    return content if _put(lists, content) else None


def _put(lists: Sequence[StoredEntries], content: Any) -> bool:
    """Put lists of shards into the splits, in place of their numbers. Returns whether each has a place."""
    splits = content.get("splits") if isinstance(content, dict) else None
    found = 0
    for split in splits.values() if isinstance(splits, dict) else ():
        if isinstance(split, dict) and split.get("shards") == [found]:
            split["shards"] = lists[found]
            found += 1
    return found == len(lists)


def _scan_list(file: BinaryIO, start: int) -> StoredEntries | None:
    """The entries of a list whose first one begins at `start`; None if there is anything else in the list."""
    columns = np.empty((3, os.fstat(file.fileno()).st_size // _SHORTEST), np.int64)  # only what is written takes memory
    count, at, why = 0, start, _MORE
    while why == _MORE:
        chunk = os.pread(file.fileno(), _CHUNK, at)
        before = count
        count, used, why = _scan(np.frombuffer(chunk, np.uint8), at, _ENTRY, columns, count)
        if why == _OTHER or (why == _MORE and count == before):
            return None
        at += used
    return StoredEntries(file, columns[:, :count], at)


@jit
def _scan(text: Any, start: Any, entry: Any, columns: Any, count: Any) -> Any:
    """Scan a list's entries, and append them to the first `count` of `columns`. text: bytes of the file from `start` on.

    Returns the new count, the number of bytes scanned, and where the scan stopped.
    """
    at = 0
    while True:
        first, row = at, 0  # the entry's first byte, and the next row of `columns`
        for wanted in entry:
            if at == len(text):
                return count, first, _MORE
            if wanted == _BLANK:
                while at < len(text) and (text[at] == 0x20 or 0x09 <= text[at] <= 0x0A or text[at] == 0x0D):
                    at += 1
            elif wanted == _COUNT:
                number, begin = np.int64(0), at
                while at < len(text) and 0x30 <= text[at] <= 0x39:
                    number = 10 * number + np.int64(text[at]) - 0x30
                    at += 1
                if not 0 < at - begin < 19 or (at - begin > 1 and text[begin] == 0x30):
                    return count, first, _OTHER
                columns[row, count] = number
                row += 1
            elif wanted == _STRING:
                while at < len(text) and text[at] != _QUOTE:
                    if text[at] < 0x20 or text[at] > 0x7E or text[at] == _ESCAPE:
                        return count, first, _OTHER
                    at += 1
            elif text[at] != wanted:
                return count, first, _OTHER
            else:
                at += 1
        if at == len(text):
            return count, first, _MORE
        if text[at] != _COMMA and text[at] != _CLOSE:
            return count, first, _OTHER
        columns[row, count] = start + first
        count += 1
        if text[at] == _CLOSE:
            return count, at, _END
        at += 1
