"""Convert one image: check it, and encode it as the profile requires.

| image | lossless | compact | original |
| --- | --- | --- | --- |
| JPEG (8 bit), also progressive, arithmetic-coded | the same coefficients, region-addressable | re-encoded | unchanged |
| CMYK or YCCK JPEG | the same | re-encoded, Pillow's conversion to RGB | unchanged |
| Adobe RGB JPEG (transform 0) | the same, with its APP14 marker | re-encoded as YCbCr | unchanged |
| JPEG whose scans are not complete, or with more than 10 blocks in an MCU | re-encoded | re-encoded | unchanged |
| PNG with 8-bit RGB or gray, under any name | unchanged | re-encoded | unchanged |
| lossy WebP | unchanged | re-encoded | unchanged |
| other PNG (palette, alpha, 16-bit colors), other WebP, BMP | PNG of its pixels, alpha dropped | re-encoded | unchanged |
| gray PNG with 16 bits | PNG of the upper 8 bits | re-encoded | PNG of the upper 8 bits |
| animated PNG or WebP | PNG of the first frame | re-encoded | PNG of the first frame |
| other formats that Pillow opens (first frame of GIF, TIFF) | PNG of its pixels | re-encoded | PNG of its pixels |
| damaged JPEG that decoders accept | re-encoded as decoded | re-encoded | unchanged |
| JPEG or PNG whose metadata Pillow fails at | the same, without it | re-encoded | without it |
| JPEG of more than 100 scans, which would take minutes | left out | left out | left out |
| 12-bit JPEG, undecodable, truncated, more than 178,956,970 pixels | left out | left out | left out |
| 32-bit or floating-point pixels (TIFF), which have no defined range | left out | left out | left out |

Re-encoding: for `lossless` and `original`, quality 95, 4:4:4. For `compact`, the short side is reduced to at most 480 (Lanczos),
quality 90, 4:2:0. Grayscale images stay grayscale. Re-encoded images are region-addressable, too, but PNG and WebP are decoded in
full. With `reencode`, `lossless` re-encodes these, and `original` what it would store as PNG of its pixels. `lossless` keeps an
image that is no JPEG only if all engines decode it to the same pixels. Orientation tags and color profiles are ignored, as in
every published ImageNet result. Metadata (EXIF, XMP, ICC profiles, comments) is dropped, except in images that are unchanged.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
from contextlib import suppress
from typing import NamedTuple
from xml.etree import ElementTree

from PIL import Image

from ..jpeg.header import parse, without_metadata
from ..jpeg.region import RegionError
from ..jpeg.transcode import transcode
from ..pixels.decoder import MAX_SCANS, decode_jpeg, has_many_scans, to_8_bits
from ..pixels.formats import is_lossy_webp, is_plain_png, png_without_metadata, unreadable_format

PROFILES = ("lossless", "compact", "original")
MAX_PIXELS = 178_956_970  # Pillow's limit for decompression bombs
COMPACT_SHORT = 480  # pixels: the largest short side of the scale jitter
ENGINE_FORMATS = ("JPEG", "MPO", "PNG", "BMP", "WEBP")  # decoded by every engine; MPO is a JPEG followed by more images

DECODED_IN_FULL = "decoded in full, not at the crop"  # a fact: with `lossless`, that it is no JPEG

_GREY_MODES = ("1", "L", "LA", "La")
_SRGB = re.compile(rb"srgb|\x03c2")  # "c2" is the sRGB profile of Facebook's images
_LINEAR = re.compile(rb"linear|-g10")  # primaries of sRGB, but not its tone curve


class UnreadableError(ValueError):
    """An image that cannot be used; the message says why, in one line."""


class ConvertedImage(NamedTuple):
    """An image in its stored form.

    data: the encoded bytes. height, width: pixels. facts: findings for the report, such as "CMYK". decoded: the image, in any
    mode; None for a transcoded JPEG, which was not decoded to pixels.
    """

    data: bytes
    height: int
    width: int
    facts: tuple[str, ...]
    decoded: Image.Image | None

    def image(self) -> Image.Image:
        """The decoded image, in any mode."""
        return _open_by_pillow(self.data) if self.decoded is None else self.decoded


def convert_image(data: bytes, profile: str, reencode: bool = False) -> ConvertedImage:
    """Check `data` and convert it as the profile requires. Raises UnreadableError.

    reencode: with the profile "lossless", store JPEGs of quality 95 instead of PNG and WebP.
    """
    if has_many_scans(data):
        raise UnreadableError(f"a JPEG of more than {MAX_SCANS} scans")
    try:
        return _convert(data, profile, reencode)
    except MemoryError as error:
        raise UnreadableError("converting it needs more memory than there is") from error


def _convert(data: bytes, profile: str, reencode: bool) -> ConvertedImage:
    if profile == "lossless" and not _has_metadata(data):  # most of ImageNet; there is nothing to report
        with suppress(RegionError, ValueError):
            return _lossless(data, ())
    image, data, facts = _open(data)
    if profile == "compact":
        return _compact(_load(image), facts)
    if image.format in ("JPEG", "MPO"):
        if profile == "original":
            return ConvertedImage(data, image.height, image.width, facts, _load(image))
        try:
            return _lossless(data, facts)
        except (RegionError, ValueError) as error:
            facts += (f"re-encoded: {error}",)
            reencode = True
    elif profile == "original" and _is_kept(image):
        return ConvertedImage(data, image.height, image.width, facts, _load(image))
    elif reencode:
        facts += (f"re-encoded: {image.format}",)
    loaded = _load(image)
    if reencode:
        stored = _encode(loaded, 95, "4:4:4")
    elif is_plain_png(data) or (is_lossy_webp(data) and image.mode == "RGB"):
        stored = data
    else:
        stored, facts = _to_png(loaded), (*facts, "stored as PNG of its pixels")
    if profile == "lossless" and not reencode:
        facts += (DECODED_IN_FULL,)
    return ConvertedImage(stored, loaded.height, loaded.width, facts, loaded)


def _is_kept(image: Image.Image) -> bool:
    """Whether `original` keeps an image that is no JPEG: every engine decodes it, and to the same pixels."""
    return image.format in ENGINE_FORMATS and image.mode[0] not in "IF" and not getattr(image, "is_animated", False)


def _has_metadata(data: bytes) -> bool:
    """Whether a JPEG has EXIF, XMP, an Adobe marker, or a color profile other than sRGB."""
    head = data[: data.find(b"\xff\xda")]
    if b"Exif\0" in head or b"ns.adobe.com" in head or b"Adobe" in head:
        return True
    at = head.find(b"ICC_PROFILE\0")
    return at >= 0 and not _is_srgb(head[at + 14 :])


def _is_srgb(profile: bytes) -> bool:
    """Whether an ICC profile, or its beginning, describes itself as sRGB. False for a damaged one."""
    try:
        for at in range(132, 132 + 12 * min(int.from_bytes(profile[128:132]), 100), 12):
            tag, offset, size = struct.unpack_from(">4sII", profile, at)
            if tag == b"desc":
                text = profile[offset : offset + min(size, 1000)].replace(b"\0", b"").lower()  # ASCII, or UTF-16 of ASCII
                return bool(_SRGB.search(text)) and not _LINEAR.search(text)
    except struct.error:
        pass
    return False


def _lossless(data: bytes, facts: tuple[str, ...]) -> ConvertedImage:
    """Transcode a JPEG. Raises RegionError for other or damaged images, ValueError for too large or undecodable ones.

    Transcoding reads every coefficient. What else a decoder needs, it finds in the header, so that decoding one tile is enough.
    """
    header = parse(data)
    if header.height * header.width > MAX_PIXELS:
        raise ValueError("too many pixels")
    if len(header.sampling) == 4 and "CMYK" not in facts:  # with no metadata, it was not opened
        facts = ("CMYK", *facts)
    return ConvertedImage(transcode(data, decode_jpeg), header.height, header.width, facts, None)


def _open(data: bytes) -> tuple[Image.Image, bytes, tuple[str, ...]]:
    """The image, not decoded yet, and facts about it; and `data`, without the metadata if Pillow fails at that."""
    facts: tuple[str, ...] = ()
    try:
        image = _open_by_pillow(data)
    except UnreadableError as error:
        try:
            data = png_without_metadata(data) if data.startswith(b"\x89PNG") else without_metadata(data)
        except RegionError:
            raise error from None
        image, facts = _open_by_pillow(data), ("malformed metadata, removed",)
    if image.width * image.height > MAX_PIXELS:
        raise UnreadableError(f"{image.width} x {image.height} is more than {MAX_PIXELS} pixels")
    return image, data, facts + _facts(image)


def _open_by_pillow(data: bytes) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `_facts` reports broken metadata, and large images are refused
            image = Image.open(io.BytesIO(data))
            if image.format == "PNG" and image.width * image.height <= MAX_PIXELS:
                image.load()  # metadata may follow the pixels
            return image
    except MemoryError:
        raise
    except Exception as error:
        raise UnreadableError(unreadable_format(data) or _reason(error)) from error


def _load(image: Image.Image) -> Image.Image:
    """The image, decoded in full, in mode L or RGB."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = to_8_bits(image)
            return image.convert("L" if image.mode in _GREY_MODES else "RGB")
    except MemoryError:
        raise
    except Exception as error:  # decoders raise a dozen types; each means the same
        raise UnreadableError(_reason(error)) from error


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return "not an image" if text.startswith("cannot identify image file") else text or type(error).__name__


def _compact(image: Image.Image, facts: tuple[str, ...]) -> ConvertedImage:
    short = min(image.size)
    if short > COMPACT_SHORT:
        width, height = (round(side * COMPACT_SHORT / short) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return ConvertedImage(_encode(image, 90, "4:2:0"), image.height, image.width, facts, image)


def _encode(image: Image.Image, quality: int, subsampling: str) -> bytes:
    stream = io.BytesIO()
    try:
        image.save(stream, "JPEG", quality=quality, subsampling=subsampling)
    except (OSError, ValueError) as error:  # a side beyond 65,500
        raise UnreadableError(f"{image.width} x {image.height} is more than a JPEG can hold") from error
    return transcode(stream.getvalue())


def _to_png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.info = {}  # would be written as metadata
    image.save(stream, "PNG", compress_level=3)  # 2 % larger than with the default, 6, in half the time
    return stream.getvalue()


def _facts(image: Image.Image) -> tuple[str, ...]:
    facts = []
    if image.format not in ("JPEG", "MPO"):
        facts.append(f"not a JPEG: {image.format}")
    if image.mode == "CMYK":
        facts.append("CMYK")
    if image.info.get("adobe_transform") == 0 and image.mode == "RGB":
        facts.append("Adobe RGB")
    broken, orientation = _metadata(image)
    if orientation != 1:
        facts.append("orientation tag, ignored")
    if (profile := image.info.get("icc_profile")) and not _is_srgb(profile):
        facts.append("embedded color profile, ignored")
    if broken:
        facts.append("broken metadata")
    return tuple(facts)


def _metadata(image: Image.Image) -> tuple[bool, int]:
    """Whether EXIF or XMP cannot be parsed, and the orientation tag (1 without one)."""
    broken, orientation = False, 1
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            if "exif" in image.info:
                exif = Image.Exif()  # image.getexif() may have warned already, when it was opened
                exif.load(image.info["exif"])
                exif.get_ifd(0x8769)
                orientation = exif.get(0x0112, 1)
            if "xmp" in image.info:
                ElementTree.fromstring(image.info["xmp"].rstrip(b"\0 "))
        except Exception:  # parsers of broken data raise any type
            broken = True
    return broken or bool(warned), orientation
