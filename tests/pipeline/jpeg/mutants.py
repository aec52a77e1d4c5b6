"""Attack the codec with damaged JPEGs whose bytes end at an unreadable page: `python -m tests.pipeline.jpeg.mutants SEED COUNT`.

Prints, as JSON, how often each function had each outcome for damage in each zone of the file (table, header, data, all):

- refused;
- exact: the pixels of the undamaged image;
- agreed: other pixels, which libjpeg-turbo decodes from the damaged file, too;
- refused as a whole: other pixels, of a file in which libjpeg-turbo stops elsewhere;
- differs: pixels that neither has.

A read or write beyond a buffer is an IndexError with NUMBA_BOUNDSCHECK=1, or a segmentation fault.
"""

from __future__ import annotations

import ctypes
import io
import json
import mmap
import sys
from collections import Counter
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from pipeline.jpeg.decode import decode
from pipeline.jpeg.region import RegionError, cut
from pipeline.jpeg.transcode import transcode
from pipeline.pixels.decoder import CorruptImageError, Decoder
from tests.helpers import SUBSAMPLINGS, jpeg, random_image

Pixels = npt.NDArray[np.uint8]
ZONES = ("table", "header", "data", "all")
EXTREMES = (0, 1, 2, 3, 7, 8, 15, 16, 17, 127, 128, 254, 255)


class Guarded:
    """Memory for arrays that end where an unreadable page begins."""

    def __init__(self, size: int) -> None:
        page = mmap.PAGESIZE
        self._size = -(-size // page) * page
        self._memory = mmap.mmap(-1, self._size + page)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mprotect(ctypes.c_void_p(address + self._size), ctypes.c_size_t(page), 0):
            raise OSError(ctypes.get_errno(), "mprotect")
        self._whole = np.frombuffer(self._memory, np.uint8, self._size)

    def array(self, size: int) -> Pixels:
        return self._whole[self._size - size :]

    def holding(self, data: bytes) -> Pixels:
        array = self.array(len(data))
        array[:] = np.frombuffer(data, np.uint8)
        return array


def zone_of(data: bytes, zone: str) -> tuple[int, int]:
    """Where a zone begins and ends. The header is all before the entropy-coded data except for the table, if there is one."""
    scan = data.index(b"\xff\xda")
    scan += 2 + int.from_bytes(data[scan + 2 : scan + 4], "big")
    table = data.find(b"CROPFEED") - 4
    end = data.index(b"\xff\xdb")  # DQT follows the table
    return {"table": (max(table, 2), end), "header": (end, scan), "data": (scan, len(data)), "all": (2, len(data))}[zone]


def mutate(data: bytes, rng: np.random.Generator, zone: str) -> bytes:
    """Damage one zone: flip bits, set bytes or 16-bit numbers, truncate, insert, delete, or copy from elsewhere."""
    low, high = zone_of(data, zone)
    mutant = bytearray(data)

    def at() -> int:
        return int(rng.integers(low, high))

    kind, place, length = int(rng.integers(8)), at(), int(rng.integers(1, 9))
    if kind < 2:
        for _ in range(1 if kind == 0 else length):
            mutant[at()] ^= 1 << int(rng.integers(8))
    elif kind == 2:
        mutant[place] = int(rng.choice(EXTREMES)) if rng.integers(2) else int(rng.integers(256))
    elif kind == 3:
        mutant[place : place + 2] = int(rng.choice((0, 1, 2, 255, 256, 65534, 65535))).to_bytes(2, "big")
    elif kind == 4:
        del mutant[place:]
    elif kind == 5:
        mutant[place:place] = bytes([0xFF, int(rng.integers(0xC0, 256))]) if rng.integers(2) else rng.bytes(length)
    elif kind == 6:
        del mutant[place : place + length]
    else:
        start = at()
        mutant[place : place + length] = data[start : start + length]
    return bytes(mutant)


def by_libjpeg(data: bytes) -> list[Pixels]:
    """What simplejpeg and Pillow decode. simplejpeg does not accept some headers that Pillow does."""
    found = []
    with suppress(ValueError):
        found.append(np.asarray(simplejpeg.decode_jpeg(data, strict=False)))
    with suppress(Exception):  # Pillow raises a dozen types
        found.append(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    return found


class Attack:
    """One source image, and the buffers for its mutants. place: top, left, height, width, as `decode` fills it."""

    def __init__(self, number: int) -> None:
        size = (61 + 7 * number, 90 - 5 * number)
        self.original = jpeg(random_image(*size, number), SUBSAMPLINGS[number % len(SUBSAMPLINGS)], 92)
        self.stored = transcode(self.original)
        self.whole = simplejpeg.decode_jpeg(self.stored)
        self._input, self._scratch, self._out = Guarded(1 << 17), Guarded(1 << 20), Guarded(1 << 16)
        self._decoder = Decoder()

    def window(self, rng: np.random.Generator) -> tuple[int, int, int, int]:
        (top, bottom), (left, right) = (np.sort(rng.choice(side + 1, 2, replace=False)).tolist() for side in self.whole.shape[:2])
        return top, left, bottom, right

    def decode(self, mutant: bytes, window: tuple[int, int, int, int]) -> Pixels | None:
        data, place = self._input.holding(mutant), np.zeros(4, np.int64)
        scratch = self._scratch.array(0)
        while (status := decode(data, *window, scratch, place)) > 0:
            if status > 1 << 20:
                return None
            scratch = self._scratch.array(int(status))
        return None if status < 0 else inside(scratch, place, window)

    def cut(self, mutant: bytes, window: tuple[int, int, int, int]) -> Pixels | None:
        try:
            piece = cut(self._input.holding(mutant), *window)
        except RegionError:
            return None
        pixels = by_libjpeg(piece.jpeg.tobytes())
        return inside(pixels[0].reshape(-1), np.array(piece[1:]), window) if pixels else None

    def make_views(self, mutant: bytes, window: tuple[int, int, int, int]) -> Pixels | None:
        shape = (1, window[2] - window[0], window[3] - window[1], 3)
        out = self._out.array(int(np.prod(shape))).reshape(shape)
        try:
            self._decoder.make_views(
                self._input.holding(mutant), *self.whole.shape[:2], np.array([window], np.float64), np.zeros(1, np.bool_), out
            )  # type: ignore[call-arg]
        except CorruptImageError:
            return None
        return out[0]

    def transcode(self, mutant: bytes, _: object) -> Pixels | None:
        try:
            pixels = by_libjpeg(transcode(mutant))
        except RegionError:
            return None
        return pixels[0] if pixels else None


def inside(flat: Pixels, place: npt.NDArray[np.int64], window: tuple[int, int, int, int]) -> Pixels:
    """A window of a decoded region. flat: starts with the region's pixels. place: its top, left, height, width."""
    top, left, height, width = place.tolist()
    region = flat[: 3 * height * width].reshape(height, width, 3)
    return region[window[0] - top : window[2] - top, window[1] - left : window[3] - left]


def outcome(found: Pixels | None, exact: Pixels, mutant: bytes, window: tuple[int, int, int, int] | None) -> str:
    """window: None for a whole image."""
    if found is None:
        return "refused"
    if np.array_equal(found, exact):
        return "exact"
    whole = by_libjpeg(mutant)
    if not whole:
        return "refused as a whole"
    top, left, bottom, right = window or (0, 0, *exact.shape[:2])
    return "agreed" if any(np.array_equal(found, pixels[top:bottom, left:right]) for pixels in whole) else "differs"


def main(seed: int, count: int, save: str = "") -> None:
    rng = np.random.default_rng(seed)
    attacks = [Attack(number) for number in range(len(SUBSAMPLINGS))]
    totals = Counter[str]()
    for trial in range(count):
        attack, zone = attacks[trial % len(attacks)], ZONES[trial // len(attacks) % len(ZONES)]
        window = attack.window(rng)
        top, left, bottom, right = window
        mutant = mutate(attack.stored, rng, zone)
        cases: list[tuple[str, bytes, Any]] = [(name, mutant, window) for name in ("decode", "cut", "make_views")]
        cases.append(("transcode", mutate(attack.original, rng, zone), None))
        for name, data, where in cases:
            found = getattr(attack, name)(data, where)
            result = outcome(found, attack.whole[top:bottom, left:right] if where else attack.whole, data, where)
            totals[f"{name} {zone} {result}"] += 1
            if save and result == "differs":
                np.savez(f"{save}/{name}-{zone}-{trial}.npz", data=np.frombuffer(data, np.uint8), window=window, found=found)
    print(json.dumps(totals))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
