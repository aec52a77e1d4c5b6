"""One stored image to pictures on the CPU: cut the region that they need, decode it by libjpeg-turbo, resample each window.

libjpeg-turbo comes with the simplejpeg wheel. Everything that takes time runs without the GIL: a Python thread per core, each
with a `Decoder` of its own, fills all cores.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
from numba import njit
from PIL import Image

from pipeline.region import Bytes, _cut
from pipeline.resample import resample

Pixels = npt.NDArray[np.uint8]


class CorruptImageError(ValueError):
    """An image that no decoder of ours can read; the message says why, in one line."""


class Decoder:
    """Makes pictures in memory that it keeps from one image to the next: one decoder for each thread."""

    def __init__(self) -> None:
        self._piece = np.empty(1 << 17, np.uint8)  # a cut
        self._pixels = np.empty(1 << 20, np.uint8)  # what it decodes to
        self._place = np.empty(4, np.int64)  # where it lies: top, left, height, width

    def pictures(self, data: Bytes, height: int, width: int, windows: npt.NDArray[np.float64], flip: Any, out: Pixels) -> None:
        """Fill `out` with the pictures of an image's windows; the image is decoded once for all of them.

        data: uint8 (bytes,), the stored image, any format that Pillow reads. height, width: its size, pixels. windows: (C, 4) of
        top, left, bottom, right, source pixels. flip: bool (C,), mirror left to right. out: uint8 (C, h, w, 3), C-contiguous.
        Raises CorruptImageError.
        """
        if len(self._piece) < len(data):
            self._piece = np.empty(2 * len(data), np.uint8)
        length = _cut_windows(data, height, width, windows, out.shape[1], out.shape[2], self._piece, self._place)
        jpeg = self._piece[:length] if length > 0 else data
        room = 3 * int(self._place[2] * self._place[3])
        if len(self._pixels) < room:
            self._pixels = np.empty(2 * room, np.uint8)
        try:
            if length < 0 and simplejpeg.decode_jpeg_header(data)[2] == "CMYK":
                raise ValueError("libjpeg-turbo's way from CMYK to RGB is not Pillow's")
            pixels = simplejpeg.decode_jpeg(jpeg, buffer=self._pixels)
        except ValueError:  # CMYK, or no JPEG at all, or damaged
            pixels = decode_by_pillow(data)
            self._place[:] = 0, 0, height, width
        if pixels.shape[:2] != (self._place[2], self._place[3]):
            raise CorruptImageError(
                f"holds {pixels.shape[0]} x {pixels.shape[1]} pixels, not the {height} x {width} it was stored with"
            )
        _resample_windows(pixels, self._place, windows, flip, out)


def decode_by_pillow(data: Bytes) -> Pixels:
    """A whole image, uint8 (H, W, 3). Raises CorruptImageError where Pillow cannot decode it."""
    try:
        return np.array(Image.open(io.BytesIO(data.data)).convert("RGB"))
    except Exception as error:  # Pillow raises a dozen kinds
        raise CorruptImageError(" ".join(str(error).split()) or type(error).__name__) from error


def why_corrupt(data: Bytes) -> str | None:
    """Why an image cannot be decoded, or None: the same verdict for every engine."""
    try:
        decode_by_pillow(data)
    except CorruptImageError as error:
        return str(error)
    return None


@njit(nogil=True, cache=True)
def _cut_windows(data: Any, height: Any, width: Any, windows: Any, rows: Any, columns: Any, piece: Any, place: Any) -> Any:
    """Cut what resampling all `windows` to (rows, columns) needs; returns the cut's bytes, or a negative number where the image
    does not open at the crop. place: gets top, left, height, width of the cut, or of the whole image.
    """
    top, left, bottom, right = height, width, np.int64(0), np.int64(0)
    for i in range(len(windows)):
        # As plan.regions has it: the filter reaches max(scale, 1) source pixels beyond the window, and one more for rounding.
        y_margin = max((windows[i, 2] - windows[i, 0]) / rows, 1.0) + 1.0
        x_margin = max((windows[i, 3] - windows[i, 1]) / columns, 1.0) + 1.0
        top, left = (
            min(top, np.int64(max(windows[i, 0] - y_margin, 0.0))),
            min(left, np.int64(max(windows[i, 1] - x_margin, 0.0))),
        )
        bottom = max(bottom, min(np.int64(np.ceil(windows[i, 2] + y_margin)), height))
        right = max(right, min(np.int64(np.ceil(windows[i, 3] + x_margin)), width))
    length = _cut(data, top, left, bottom, right, piece, place)
    if length < 0:
        place[0], place[1], place[2], place[3] = 0, 0, height, width
    return length


@njit(nogil=True, cache=True)
def _resample_windows(pixels: Any, place: Any, windows: Any, flip: Any, out: Any) -> None:
    top, left = float(place[0]), float(place[1])
    for i in range(len(windows)):
        resample(pixels, windows[i, 0] - top, windows[i, 1] - left, windows[i, 2] - top, windows[i, 3] - left, flip[i], out[i])
