"""From a stored image to the pixels of its views, on the CPU: decode the region that they need, resample each window.

Three decoders are tried in turn:
1. `jpeg.decode`, for region-addressable JPEGs, in one call without the GIL;
2. libjpeg-turbo, from the simplejpeg wheel, or Pillow for the JPEGs that simplejpeg decodes differently or not at all: on the cut
   region if the image has a table of segments, else on the whole image;
3. Pillow, on the whole image.
An image that Pillow cannot decode either is corrupt.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, UnidentifiedImageError

from ..errors import CorruptImageError as CorruptImageError
from ..jit import Int, jit
from ..jpeg.decode import REFUSED, decode
from ..jpeg.region import NO_TABLE, Bytes, Ints, big16, cut_into
from .formats import unreadable_format
from .resample import BILINEAR, Kernel, resample

Pixels = npt.NDArray[np.uint8]
Windows = npt.NDArray[np.float64]

MAX_SCANS = 100  # of a JPEG: encoders write about 10; 100 take seconds in the largest image
_MARKER = re.compile(rb"\xff+[\x01-\xcf\xd8-\xfe]", re.DOTALL)  # a marker of a JPEG, except for restart markers


class Decoder:
    """Decodes and resamples images, in buffers that are reused from one image to the next. Each thread needs its own decoder."""

    def __init__(self) -> None:
        self._scratch = np.empty(1 << 21, np.uint8)  # decoded samples and pixels
        self._place = np.empty(4, np.int64)  # which part of the image they are: top, left, height, width
        self.is_part = False  # whether images lack the bytes outside the windows, so that only `jpeg.decode` can decode them

    def make_views(
        self, data: Bytes, height: int, width: int, windows: Windows, flip: Any, out: Pixels, kernel: Kernel = BILINEAR
    ) -> None:
        """Fill `out` with the views of an image. The image is decoded once for all of them.

        data: uint8 (bytes,), the stored image, in any format that Pillow reads. height, width: its size, pixels. windows: (C, 4),
        top, left, bottom, right, source pixels. flip: bool (C,), mirror left to right. out: uint8 (C, h, w, 3), C-contiguous.
        Raises CorruptImageError.
        """
        if kernel is not BILINEAR:
            pixels, place = self.decode_region(data, height, width, windows, out.shape[1:3], kernel)
            resample_windows(pixels, place, windows, flip, kernel, out)
            return
        left = np.ones(1, np.bool_)
        with _memory_errors_are_corrupt():
            self.make_several(data, np.array([len(data)]), np.array([height]), np.array([width]), windows, flip, out, left)
            if left[0]:
                pixels = self._pixels(data, height, width, windows, out.shape[1:3], kernel)
                resample_windows(pixels, self._place, windows, flip, kernel, out)

    def make_several(
        self, data: Bytes, ends: Ints, heights: Ints, widths: Ints, windows: Windows, flip: Any, out: Pixels, left: Any
    ) -> None:
        """`make_views` for N images in one call without the GIL, bilinear. Images that `jpeg.decode` refuses are left.

        data: uint8 (bytes,), the stored images, one after the other. ends: int64 (N,), where each ends. heights, widths: int64
        (N,). windows, flip, out: of all views, (N * C, ...). left: bool (N,), the images to make; cleared for those made.
        """
        while lacking := decode_views(data, ends, heights, widths, windows, flip, out, left, self._scratch, self._place):
            self._scratch = np.empty(2 * lacking, np.uint8)

    def make_groups(
        self,
        data: Bytes,
        height: int,
        width: int,
        windows: Windows,
        flip: Any,
        out: Sequence[Pixels],
        kernel: Kernel = BILINEAR,
    ) -> None:
        """`make_views` for views of several sizes, from one decode. out: uint8 (c, h, w, 3) for each size; windows, flip: of all
        these views, in this order."""
        if len(out) == 1:
            self.make_views(data, height, width, windows, flip, out[0], kernel)
            return
        window, size = joint_window(height, width, windows, [one.shape[:3] for one in out], kernel)
        pixels, place = self.decode_region(data, height, width, window, size, kernel)
        resample_groups(pixels, place, windows, flip, kernel, out)

    def decode_region(
        self, data: Bytes, height: int, width: int, windows: Windows, size: tuple[int, int], kernel: Kernel = BILINEAR
    ) -> tuple[Pixels, Ints]:
        """Decode the region that windows of `size` need, without resampling. Raises CorruptImageError.

        Returns its pixels, uint8 (H, W, 3), which the decoder's next call overwrites, and its place in the image: top, left,
        height, width.
        """
        with _memory_errors_are_corrupt():
            while (lacking := _decode(data, height, width, windows, *size, kernel.support, self._scratch, self._place)) > 0:
                self._scratch = np.empty(2 * lacking, np.uint8)
            if lacking < 0:
                return self._pixels(data, height, width, windows, size, kernel), self._place
        rows, columns = self._place[2:].tolist()
        return self._scratch[: 3 * rows * columns].reshape(rows, columns, 3), self._place

    def _pixels(self, data: Bytes, height: int, width: int, windows: Any, size: tuple[int, int], kernel: Kernel) -> Pixels:
        """Decode the region that the windows need with libjpeg-turbo, or the image with Pillow: uint8 (H, W, 3), at `_place`."""
        if self.is_part:
            raise CorruptImageError("only a part of it was read")
        check_scans(data)
        piece = np.empty(len(data), np.uint8)
        length = cut_windows(data, height, width, windows, *size, kernel.support, piece, self._place)
        stream = piece[:length] if length > 0 else data
        if is_plain_jpeg(stream):
            _check_size(*jpeg_header(stream)[:2], *self._place[2:].tolist())
            with suppress(ValueError):  # damaged
                pixels: Pixels = simplejpeg.decode_jpeg(stream, buffer=self._scratch_for_place())
                return pixels
        elif length > 0:
            with suppress(CorruptImageError):
                return decode_by_pillow(stream, tuple(self._place[2:].tolist()))
        self._place[:] = 0, 0, height, width
        return decode_by_pillow(data, (height, width))

    def _scratch_for_place(self) -> Bytes:
        needed = 3 * int(self._place[2] * self._place[3])
        if len(self._scratch) < needed:
            self._scratch = np.empty(2 * needed, np.uint8)
        return self._scratch


@contextmanager
def _memory_errors_are_corrupt() -> Iterator[None]:
    try:
        yield
    except MemoryError as error:
        raise CorruptImageError("decoding it needs more memory than there is") from error


def _check_size(found_height: int, found_width: int, height: int, width: int) -> None:
    """Raise CorruptImageError if an image does not have the size that it was stored with. Before it is decoded, this bounds time
    and memory."""
    if (found_height, found_width) != (height, width):
        raise CorruptImageError(f"has {found_height} x {found_width} pixels, but was stored as {height} x {width}")


def check_scans(data: Any) -> None:
    """Raise CorruptImageError for a JPEG of more than `MAX_SCANS` scans. data: as for `has_many_scans`."""
    if has_many_scans(data):
        raise CorruptImageError(f"a JPEG of more than {MAX_SCANS} scans")


def has_many_scans(data: Any) -> bool:
    """Whether a JPEG has more than `MAX_SCANS` scans. Each is a pass over the whole image, for as little as 20 bytes of file.

    data: bytes, or uint8 (bytes,).
    """
    view = memoryview(data)
    if bytes(view[:2]) != b"\xff\xd8":
        return False
    scans = position = 0  # metadata, or a video after the image, can contain the same bytes
    while (found := _MARKER.search(view, position)) and (marker := found[0][-1]) != 0xD9:
        if marker in (0xC0, 0xC1):  # sequential: each scan has bits for each block, so the file's size bounds the time
            return False
        if marker == 0xDA and scans == 0 and len(re.findall(rb"\xff\xda", view)) <= MAX_SCANS:  # faster than to go on
            return False
        scans += marker == 0xDA
        position = found.end()
        if marker != 0x01 and not 0xD0 <= marker <= 0xD8:  # those have no length
            position += int.from_bytes(view[position : position + 2], "big")
    return scans > MAX_SCANS


def to_8_bits(image: Image.Image) -> Image.Image:
    """An image of 16-bit gray values with their upper 8 bits; others as they are. Pillow's own conversion would clip.

    Raises ValueError for 32-bit integers and floating-point numbers, whose range the file does not define.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):  # these two hold 16 bits at most
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"{'floating-point' if image.mode[0] == 'F' else '32-bit'} pixels, which have no defined range")
    return image


def decode_by_pillow(data: Bytes, size: tuple[int, int] | None = None) -> Pixels:
    """Decode a whole image: uint8 (H, W, 3). Raises CorruptImageError if Pillow cannot decode it, or if it does not have the
    height and width `size`."""
    check_scans(data)
    try:
        image = Image.open(io.BytesIO(data.data))
        if size is not None:
            _check_size(image.height, image.width, *size)
        return np.array(to_8_bits(image).convert("RGB"))
    except CorruptImageError:
        raise
    except UnidentifiedImageError as error:
        raise CorruptImageError(unreadable_format(data[:512].tobytes()) or "not an image of a known format") from error
    except Exception as error:  # Pillow raises a dozen types
        raise CorruptImageError(" ".join(str(error).split()) or type(error).__name__) from error


def jpeg_header(data: Bytes | bytes) -> tuple[int, int, str]:
    """Height, width and, by simplejpeg's names, colorspace of a JPEG. Raises ValueError for other data."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        return height, width, colorspace
    except KeyError as error:
        raise ValueError("sampling factors that simplejpeg has no name for") from error


def is_plain_jpeg(data: Bytes | bytes) -> bool:
    """Whether simplejpeg decodes a JPEG to the pixels that Pillow does. It converts CMYK to RGB differently, and decodes only the
    common sampling factors."""
    try:
        return jpeg_header(data)[2] not in ("CMYK", "YCCK")
    except ValueError:
        return False


def decode_jpeg(data: bytes) -> Pixels:
    """Decode a whole JPEG, also a damaged one: uint8 (H, W, 3). Raises ValueError if that fails."""
    if is_plain_jpeg(data):
        return np.asarray(simplejpeg.decode_jpeg(data, strict=False))
    return decode_by_pillow(np.frombuffer(data, np.uint8))


def why_corrupt(data: Bytes) -> str | None:
    """Why an image cannot be decoded, or None if it can. All engines use this, so that they agree."""
    try:
        decode_by_pillow(data)
    except CorruptImageError as error:
        return str(error)
    return None


@jit
def _frame(data: Bytes) -> Int:
    """The position of a JPEG's frame header (SOF), or -1."""
    at = np.int64(2) if len(data) > 2 and data[0] == 0xFF and data[1] == 0xD8 else np.int64(len(data))
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker >> 4 == 0xC and marker != 0xC4 and marker != 0xC8 and marker != 0xCC:  # these three are no frame headers
            return at
        at += 1 if marker == 0xFF else 2 + big16(data, at + 2)  # 0xFF may be repeated before a marker
    return np.int64(-1)


@jit
def has_size(data: Bytes, height: Int, width: Int) -> bool:
    """Whether the header of a JPEG says this size, for which the windows were drawn. False for data without one."""
    at = _frame(data)
    return bool(at >= 0 and big16(data, at + 5) == height and big16(data, at + 7) == width)


@jit
def has_4_components(data: Bytes) -> bool:
    """Whether it is a CMYK or YCCK JPEG."""
    at = _frame(data)
    return bool(at >= 0 and data[at + 9] == 4)


@jit
def region_of(height: Int, width: Int, windows: Windows, rows: Int, columns: Int, support: float) -> Any:
    """The region that resampling all `windows` of an image to (rows, columns) needs: top, left, bottom, right, whole pixels.

    As `sampling.regions`: the filter reaches support * max(scale, 1) source pixels beyond a window, and one more is added for
    rounding. support: of the `Kernel`.
    """
    bottom: Any = np.int64(0)
    right: Any = np.int64(0)
    top, left = height, width
    for i in range(len(windows)):
        y_margin = support * max((windows[i, 2] - windows[i, 0]) / rows, 1.0) + 1.0
        x_margin = support * max((windows[i, 3] - windows[i, 1]) / columns, 1.0) + 1.0
        top = min(top, np.int64(max(windows[i, 0] - y_margin, 0.0)))
        left = min(left, np.int64(max(windows[i, 1] - x_margin, 0.0)))
        bottom = max(bottom, min(np.int64(np.ceil(windows[i, 2] + y_margin)), height))
        right = max(right, min(np.int64(np.ceil(windows[i, 3] + x_margin)), width))
    return top, left, bottom, right


def joint_window(
    height: int, width: int, windows: Windows, groups: Sequence[tuple[int, ...]], kernel: Kernel
) -> tuple[Windows, tuple[int, int]]:
    """The windows of views of several sizes, in the form that `decode_region` and `cut_windows` take: windows, and their size.

    groups: number, height and width of the views of each size. Of several sizes, it is one window, the smallest region with all
    pixels that the views need, at scale 1.
    """
    if len(groups) == 1:
        return windows, (groups[0][1], groups[0][2])
    ends = np.cumsum([crops for crops, _, _ in groups]).tolist()
    every = np.array(
        [
            region_of(height, width, windows[end - crops : end], rows, columns, kernel.support)
            for end, (crops, rows, columns) in zip(ends, groups, strict=True)
        ]
    )
    (top, left), (bottom, right) = every[:, :2].min(axis=0).tolist(), every[:, 2:].max(axis=0).tolist()
    return np.array([[top, left, bottom, right]], np.float64), (bottom - top, right - left)


def resample_groups(
    pixels: Pixels, place: Ints, windows: Windows, flip: npt.NDArray[np.bool_], kernel: Kernel, out: Sequence[Pixels]
) -> None:
    """`resample_windows` for views of several sizes, see `Decoder.make_groups`."""
    first = 0
    for one in out:
        its = slice(first, first + len(one))
        resample_windows(pixels, place, windows[its], flip[its], kernel, one)
        first += len(one)


@jit
def cut_windows(
    data: Bytes, height: Int, width: Int, windows: Windows, rows: Int, columns: Int, support: float, piece: Bytes, place: Ints
) -> Any:
    """Cut out the region that resampling all `windows` to (rows, columns) needs, as a JPEG. Returns its size in bytes, or a
    negative number if the image is not an intact region-addressable JPEG. place: receives top, left, height, width of the cut, or
    of the whole image if there is none.
    """
    top, left, bottom, right = region_of(height, width, windows, rows, columns, support)
    length = cut_into(data, top, left, bottom, right, piece, place) if has_size(data, height, width) else NO_TABLE
    if length < 0:
        place[0], place[1], place[2], place[3] = 0, 0, height, width
    return length


@jit
def resample_windows(
    pixels: Pixels, place: Ints, windows: Windows, flip: npt.NDArray[np.bool_], kernel: Kernel, out: Pixels
) -> None:
    """Make all views of an image from a decoded region. place: its top, left, height, width. out: uint8 (C, h, w, 3)."""
    y, x = float(place[0]), float(place[1])
    for i in range(len(windows)):
        top, left, bottom, right = windows[i]
        resample(pixels, top - y, left - x, bottom - y, right - x, flip[i] != 0, kernel, out[i])


@jit
def _decode(
    data: Bytes, height: Int, width: Int, windows: Windows, rows: Int, columns: Int, support: float, scratch: Any, place: Ints
) -> Any:
    """Decode the region that resampling to (rows, columns) needs. Returns 0; a negative number if `decode` refuses the image; or
    the number of bytes that `scratch` needs."""
    if not has_size(data, height, width):
        return REFUSED
    top, left, bottom, right = region_of(height, width, windows, rows, columns, support)
    return decode(data, top, left, bottom, right, scratch, place)


@jit
def decode_views(
    data: Bytes,
    ends: Ints,
    heights: Ints,
    widths: Ints,
    windows: Windows,
    flip: npt.NDArray[np.bool_],
    out: Pixels,
    left: npt.NDArray[np.bool_],
    scratch: Any,
    place: Ints,
) -> Any:
    """Decode and resample several images, see `Decoder.make_several`. Returns 0, or the bytes that `scratch` needs to go on."""
    _, rows, columns, _ = out.shape
    crops = len(windows) // len(ends)
    start = np.int64(0)
    for i in range(len(ends)):
        image, start = data[start : ends[i]], ends[i]
        if not left[i]:
            continue
        first, last = i * crops, (i + 1) * crops
        status = _decode(image, heights[i], widths[i], windows[first:last], rows, columns, BILINEAR.support, scratch, place)
        if status > 0:
            return status
        if status == 0:
            pixels = scratch[: 3 * place[2] * place[3]].reshape(place[2], place[3], 3)
            resample_windows(pixels, place, windows[first:last], flip[first:last], BILINEAR, out[first:last])
            left[i] = False
    return 0
