from __future__ import annotations

import base64
import io
import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import simplejpeg
from PIL import Image, ImageCms

from pipeline.convert import images
from pipeline.convert.images import DECODED_IN_FULL, MAX_PIXELS, PROFILES, ConvertedImage, UnreadableError, convert_image
from pipeline.jpeg.region import RegionError, cut
from pipeline.pixels.decoder import CorruptImageError, Decoder, decode_by_pillow, why_corrupt
from tests.helpers import SUBSAMPLINGS, jpeg, open_image, random_image, run_mutants

# 32 x 24, made by libjpeg-turbo's cjpeg -arithmetic -quality 80
ARITHMETIC = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAYEBQYFBAYGBQYHBwYIChAKCgkJChQODwwQFxQYGBcUFhYaHSUfGhsjHBYWICwgIyYnKSopGR8tMC0oMCUoKSj/"
    "2wBDAQcHBwoIChMKChMoGhYaKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCj/yQARCAAYACADASIAAhEBAxEB/8wA"
    "CgAQEAUBEBEF/9oADAMBAAIRAxEAPwDSpDygBaxV7G3poEhzuT8Sa/EpPfjfwzKK/e/kwLsigIf5y7uurPr3lcSD21Vn8Idk98ciOmm+irXlkqtdxTQuuBhe"
    "XiD2nuhQfiwnxDBTkej6TG4OzxK2O8lZJQwE6Q/M0Q/jYMe7uv7dSF5Nm6plyXqaKTWtUiL8v40xyhLnKm2pAQnyU2JL7FVMAzh5UxY3MP6hcDl/Fgp5thlI"
    "K4eIkP2SLXnO+d5NUCRNmMZHLhBcX/Im5Tt3s4vm1BkMjjsd7qI66MN/6188ZQcI90l5ht2ypJAaMMMTkdCQc4ROPGDg/9k="
)
IMAGE = random_image(133, 205)


def saved(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pixels(data: bytes) -> npt.NDArray[np.int16]:
    return np.asarray(open_image(data).convert("RGB")).astype(np.int16)


def decoded(stored: ConvertedImage) -> npt.NDArray[np.int16]:
    return np.asarray(stored.image().convert("RGB")).astype(np.int16)


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def ycck() -> bytes:
    """A CMYK JPEG with an Adobe marker for YCCK."""
    data = bytearray(saved(Image.fromarray(IMAGE).convert("CMYK"), quality=90))
    data[data.index(b"Adobe") + 11] = 2
    return bytes(data)


def non_interleaved() -> bytes:
    """A baseline JPEG with one scan per component, assembled from three greyscale JPEGs, as no installed encoder writes it."""
    planes = [jpeg(IMAGE[..., c : c + 1].repeat(3, axis=2), "Gray") for c in range(3)]
    header = planes[0][: planes[0].index(b"\xff\xc0")]
    frame = struct.pack(">BBHBHHB", 0xFF, 0xC0, 17, 8, *IMAGE.shape[:2], 3) + b"".join(bytes([c + 1, 0x11, 0]) for c in range(3))
    tables = planes[0][planes[0].index(b"\xff\xc4") : planes[0].index(b"\xff\xda")]
    scans = b""
    for number, plane in enumerate(planes):
        data = plane[plane.index(b"\xff\xda") : -2]
        scans += data[:5] + bytes([number + 1]) + data[6:]
    return header + frame + tables + scans + b"\xff\xd9"


def many_blocks() -> bytes:
    """The same with sampling factors of 3 x 3 for each component, which are legal because no scan is interleaved."""
    data = non_interleaved()
    return data.replace(b"\1\x11\0\2\x11\0\3\x11\0", b"\1\x33\0\2\x33\0\3\x33\0")


def turned_411() -> bytes:
    """A JPEG with the sampling factors of a 4:1:1 one turned by 90 degrees, luma 1 x 4."""
    data = bytearray(jpeg(random_image(64, 64), "411"))
    at = data.index(b"\xff\xc0") + 11
    assert data[at] == 0x41
    data[at] = 0x14
    return bytes(data)


def damaged() -> bytes:
    """A JPEG with damaged entropy-coded data, which decoders accept with a warning."""
    data = bytearray(jpeg(IMAGE, "420"))
    middle = len(data) // 2
    data[middle:middle] = b"\xff\xd3"  # a restart marker where there are none
    return bytes(data)


def png(colour_type: int, depth: int, values: npt.NDArray[Any], interlace: int = 0, passes: tuple[Any, ...] = ()) -> bytes:
    """A PNG without filters. passes: of an interlaced one, its rows."""
    rows = b"".join(b"\0" + row.tobytes() for part in passes or (values,) for row in part)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], depth, colour_type, 0, 0, interlace)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def with_chunk(data: bytes, name: bytes, content: bytes, before: bytes = b"IDAT") -> bytes:
    at = data.index(before) - 4
    return data[:at] + chunk(name, content) + data[at:]


def interlaced() -> bytes:
    steps = ((0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4), (2, 4, 0, 2), (0, 2, 1, 2), (1, 2, 0, 1))
    return png(2, 8, IMAGE, 1, tuple(IMAGE[top::down, left::right] for top, down, left, right in steps))


def translucent(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.putalpha(Image.fromarray(IMAGE[..., 0]))
    return image


COLOUR, GREY = Image.fromarray(IMAGE), Image.fromarray(IMAGE).convert("L")
DEEP = Image.fromarray((np.asarray(GREY).astype(np.uint16) << 8) + 77)
# name -> the file, and a word of the fact that the report must contain (None: no fact)
REENCODED: dict[str, tuple[bytes, str]] = {
    "damaged": (damaged(), "re-encoded"),
    "too many blocks in an mcu": (many_blocks(), "27 blocks in an MCU"),
}
# images other than JPEGs that are stored as they are
PLAIN: dict[str, bytes] = {
    "png": saved(COLOUR, "PNG"),
    "grey png": saved(GREY, "PNG"),
    "interlaced png": interlaced(),
    "turned png": saved(COLOUR, "PNG", exif=exif(6)),
    "linear png": with_chunk(saved(COLOUR, "PNG"), b"gAMA", struct.pack(">I", 100_000)),
    "wide-gamut png": with_chunk(saved(COLOUR, "PNG"), b"cICP", bytes([9, 16, 0, 1])),
    "annotated png": with_chunk(saved(COLOUR, "PNG"), b"tEXt", b"Title\0an image", before=b"IEND"),
    "webp": saved(COLOUR, "WEBP", quality=80),
    "turned webp": saved(COLOUR, "WEBP", quality=80, exif=exif(6)),
}
# and those that are stored as PNGs of their pixels
REWRITTEN: dict[str, bytes] = {
    "palette png": saved(COLOUR.quantize(64), "PNG"),
    "palette png with 4 bits": saved(COLOUR.quantize(9), "PNG"),
    "palette png with a transparent color": saved(COLOUR.quantize(64), "PNG", transparency=3),
    "grey png with a transparent value": saved(GREY, "PNG", transparency=10),
    "black and white png": saved(COLOUR.convert("1"), "PNG"),
    "rgba png": saved(translucent(COLOUR), "PNG"),
    "grey png with alpha": saved(translucent(GREY), "PNG"),
    "16-bit png": png(2, 16, (IMAGE.astype(">u2") << 8) + 200),
    "animated png": saved(COLOUR, "PNG", save_all=True, append_images=[Image.fromarray(IMAGE[::-1])]),
    "animated png with another image before it": saved(
        COLOUR, "PNG", save_all=True, default_image=True, append_images=[Image.fromarray(IMAGE[::-1]), COLOUR]
    ),
    "png whose checksum is wrong": saved(COLOUR, "PNG")[:-13] + b"?" + saved(COLOUR, "PNG")[-12:],
    "png without an end": saved(COLOUR, "PNG")[:-12],
    "lossless webp": saved(COLOUR, "WEBP", lossless=True),
    "webp with alpha": saved(translucent(COLOUR), "WEBP", quality=80),
    "animated webp": saved(COLOUR, "WEBP", quality=80, save_all=True, append_images=[Image.fromarray(IMAGE[::-1])]),
    "bmp": saved(COLOUR, "BMP"),
    "grey bmp": saved(GREY, "BMP"),
    "gif": saved(COLOUR.quantize(64), "GIF"),
    "tiff": saved(COLOUR, "TIFF", compression="tiff_lzw"),
    "ppm": saved(COLOUR, "PPM"),
}
OTHERS = PLAIN | REWRITTEN
KEPT: dict[str, tuple[bytes, str | None]] = {
    **{name: (jpeg(IMAGE, name), None) for name in SUBSAMPLINGS},
    "adobe rgb": (saved(COLOUR, keep_rgb=True), "Adobe RGB"),
    "orientation": (saved(COLOUR, exif=exif(6)), "orientation"),
    "upright": (saved(COLOUR, exif=exif(1)), None),
    "restart markers": (saved(COLOUR, restart_marker_blocks=3), None),
    "arithmetic": (ARITHMETIC, None),
    "cmyk": (saved(COLOUR.convert("CMYK")), "CMYK"),
    "ycck": (ycck(), "CMYK"),
    "progressive cmyk": (saved(COLOUR.convert("CMYK"), progressive=True), "CMYK"),
    "luma 1 x 4": (turned_411(), None),
    "progressive": (saved(COLOUR, quality=92, progressive=True), None),
    "progressive grey": (saved(GREY, progressive=True), None),
    "a scan a component": (non_interleaved(), None),
    "bytes before a marker": (jpeg(IMAGE)[:-2] + b"\0\0\0\xff\xd9junk", None),
}


def assert_opens_at_the_crop(stored: ConvertedImage) -> None:
    whole = pixels(stored.data)
    top, left, bottom, right = stored.height // 3, stored.width // 4, stored.height // 2, stored.width // 2 + 1
    piece = cut(np.frombuffer(stored.data, np.uint8), top, left, bottom, right)
    inside = pixels(piece.jpeg.tobytes())[top - piece.top :, left - piece.left :][: bottom - top, : right - left]
    assert np.array_equal(inside, whole[top:bottom, left:right])


@pytest.mark.parametrize("name", KEPT)
def test_lossless_keeps_every_pixel(name: str) -> None:
    data, fact = KEPT[name]
    stored = convert_image(data, "lossless")
    assert np.array_equal(pixels(stored.data), pixels(data))
    assert np.array_equal(decoded(stored), pixels(data))
    assert (stored.width, stored.height) == open_image(data).size
    assert len(stored.facts) == (fact is not None)
    assert fact is None or fact in stored.facts[0]
    assert_opens_at_the_crop(stored)


@pytest.mark.parametrize("name", REENCODED)
def test_images_that_cannot_be_lossless_are_re_encoded_and_reported(name: str) -> None:
    data, fact = REENCODED[name]
    assert_reencoded(data, convert_image(data, "lossless"), fact)


def assert_reencoded(data: bytes, stored: ConvertedImage, fact: str) -> None:
    is_gray = open_image(data).mode in ("1", "L", "LA")
    expected = open_image(data).convert("L" if is_gray else "RGB")
    assert np.array_equal(pixels(stored.data), pixels(saved(expected, quality=95, subsampling="4:4:4")))
    assert np.array_equal(decoded(stored), pixels(data))
    assert fact in stored.facts[-1]
    assert stored.facts[-1].startswith("re-encoded: ")
    assert ("CMYK" in stored.facts) == (open_image(data).mode == "CMYK")
    assert open_image(stored.data).mode == ("L" if is_gray else "RGB")
    assert_opens_at_the_crop(stored)


@pytest.mark.parametrize("name", OTHERS)
def test_other_images_than_jpegs_are_lossless(name: str) -> None:
    data = OTHERS[name]
    stored = convert_image(data, "lossless")
    assert np.array_equal(pixels(stored.data), pixels(data))
    assert np.array_equal(decoded(stored), pixels(data))
    assert (stored.height, stored.width) == IMAGE.shape[:2]
    assert f"not a JPEG: {open_image(data).format}" in stored.facts
    assert stored.facts[-1] == DECODED_IN_FULL
    assert ("stored as PNG of its pixels" in stored.facts) == (name in REWRITTEN)
    if name in PLAIN:
        assert stored.data == data
        return
    image = open_image(stored.data)
    assert (image.format, image.mode, len(image.info)) == ("PNG", "L" if "grey" in name or "black" in name else "RGB", 0)


def test_other_images_than_jpegs_are_re_encoded_on_request() -> None:
    for data in OTHERS.values():
        assert_reencoded(data, convert_image(data, "lossless", reencode=True), str(open_image(data).format))


@pytest.mark.slow
def test_dali_decodes_other_images_than_jpegs_as_pillow_does(tmp_path: Path) -> None:
    stored = [convert_image(data, "lossless").data for data in OTHERS.values()]
    for name, found in zip(OTHERS, dali_pixels(stored), strict=True):
        assert np.array_equal(found, pixels(OTHERS[name])), name


@pytest.mark.parametrize("profile", ["lossless", "original"])
@pytest.mark.parametrize("kind", ["PNG", "PPM", "TIFF"])
def test_sixteen_bit_grays_are_scaled_not_clipped(kind: str, profile: str) -> None:
    """No engine gets such an image, as each would convert it in another way."""
    stored = convert_image(saved(DEEP, kind), profile)
    assert open_image(stored.data).mode == "L"
    assert np.array_equal(pixels(stored.data), pixels(saved(GREY, "PNG")))
    stored = convert_image(saved(DEEP, kind), profile, reencode=True)
    assert np.array_equal(pixels(stored.data), pixels(saved(GREY, quality=95)))


def profile_named(text: str, version: int) -> bytes:
    """An ICC profile with a description alone. version: 2 (ASCII) or 4 (UTF-16)."""
    if version == 2:
        tag = b"desc\0\0\0\0" + struct.pack(">I", len(text) + 1) + text.encode() + b"\0"
    else:
        tag = b"mluc\0\0\0\0" + struct.pack(">II2s2sII", 1, 12, b"en", b"US", 2 * len(text), 28) + text.encode("utf-16-be")
    entries = struct.pack(">I4sII4sII", 2, b"cprt", 156 + len(tag), 9, b"desc", 156, len(tag))
    return bytes(128) + entries + tag + b"text\0sRGB"


PROFILES_OF_COLOR = {
    "lcms": (ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), True),
    "lcms Lab": (ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes(), False),
    **{text: (profile_named(text, 2), True) for text in ("sRGB IEC61966-2.1", "Nikon sRGB 4.0.0.3001", "c2")},
    **{text: (profile_named(text, 2), False) for text in ("Adobe RGB (1998)", "Dot Gain 20%", "sRGB-elle-V4-g10.icc", "c20")},
    "sRGB, version 4": (profile_named("sRGB IEC61966-2.1", 4), True),
    "Display P3": (profile_named("Display P3", 4), False),
    "GIMP built-in Linear sRGB": (profile_named("GIMP built-in Linear sRGB", 4), False),
    "empty": (b"\0", False),
    "cut": (profile_named("sRGB", 2)[:150], False),
    "no profile": (b"no profile" * 20, False),
    "of many segments": (profile_named("Display P3", 4) + bytes(150_000), False),
}


def test_cmyk_without_an_adobe_marker_is_reported() -> None:
    data = saved(COLOUR.convert("CMYK"))
    at = data.index(b"\xff\xee")
    data = data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4]) :]
    for profile in PROFILES:
        assert convert_image(data, profile).facts == ("CMYK",)


@pytest.mark.parametrize("name", PROFILES_OF_COLOR)
def test_color_profiles_other_than_srgb_are_reported_and_ignored(name: str) -> None:
    profile, is_srgb = PROFILES_OF_COLOR[name]
    for image, kind in ((COLOUR, "JPEG"), (GREY, "JPEG"), (COLOUR.convert("CMYK"), "JPEG"), (COLOUR, "PNG"), (COLOUR, "WEBP")):
        data = saved(image, kind, icc_profile=profile)
        for stored in (convert_image(data, "lossless"), convert_image(data, "original")):
            assert ("embedded color profile, ignored" in stored.facts) != is_srgb, kind
        assert image.mode == "CMYK" or np.array_equal(pixels(convert_image(data, "lossless").data), pixels(data))


@pytest.mark.parametrize("profile", PROFILES)
def test_damaged_metadata_of_pngs_is_removed(profile: str) -> None:
    """Pillow fails at some that other decoders ignore."""
    whole = PLAIN["png"]
    large_profile = b"name\0\0" + zlib.compress(bytes(2_000_000))
    wrong_checksum = chunk(b"tEXt", b"a")[:-1] + b"?"
    for data in (
        with_chunk(whole, b"iCCP", large_profile),
        with_chunk(whole, b"iCCP", b"name\0\7"),
        with_chunk(whole, b"zTXt", large_profile, before=b"IEND"),
        whole[:33] + wrong_checksum + whole[33:],
        whole[:-12] + wrong_checksum + whole[-12:],
    ):
        stored = convert_image(data, profile)
        assert np.array_equal(decoded(stored), IMAGE)
        if profile != "compact":
            assert np.array_equal(pixels(stored.data), IMAGE)


def test_pillow_decodes_stored_sixteen_bit_grays_in_the_same_way() -> None:
    """In shards that an earlier version has made."""
    decoded = decode_by_pillow(np.frombuffer(saved(DEEP, "PNG"), np.uint8))
    assert np.array_equal(decoded, np.asarray(GREY.convert("RGB")))


@pytest.mark.parametrize("profile", PROFILES)
def test_unusual_sampling_factors(profile: str) -> None:
    stored = convert_image(turned_411(), profile)
    assert np.abs(pixels(stored.data) - pixels(turned_411())).mean() < (12 if profile == "compact" else 4)
    windows, out = np.array([[8.0, 8.0, 40.0, 40.0]]), np.empty((1, 32, 32, 3), np.uint8)
    Decoder().make_views(np.frombuffer(stored.data, np.uint8), 64, 64, windows, np.zeros(1, np.bool_), out)
    assert np.array_equal(out[0], pixels(stored.data)[8:40, 8:40])


@pytest.mark.parametrize("name", ["420", "444", "Gray", "cmyk", "png", "damaged", "orientation"])
def test_compact_is_small_and_region_addressable(name: str) -> None:
    data = file(name)
    stored = convert_image(data, "compact")
    assert np.abs(pixels(stored.data) - pixels(data)).mean() < 5
    assert_opens_at_the_crop(stored)
    image = open_image(stored.data)
    assert image.mode == ("L" if name == "Gray" else "RGB")
    if image.mode == "RGB":
        assert [layer[1:3] for layer in image.layer] == [(2, 2), (1, 1), (1, 1)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (1200, 961), (481, 700), (479, 479)])
def test_compact_limits_the_short_side(size: tuple[int, int]) -> None:
    stored = convert_image(jpeg(random_image(*size), "444"), "compact")
    assert min(stored.height, stored.width) == min(480, *size)
    assert abs(stored.width / stored.height - size[1] / size[0]) < 0.005
    assert open_image(stored.data).size == (stored.width, stored.height)
    expected = Image.fromarray(random_image(*size)).resize((stored.width, stored.height), Image.Resampling.LANCZOS)
    assert np.abs(pixels(stored.data) - np.asarray(expected)).mean() < 5
    reference = open_image(saved(COLOUR, quality=90)).quantization  # type: ignore[attr-defined]
    assert open_image(stored.data).quantization == reference  # type: ignore[attr-defined]


def file(name: str) -> bytes:
    return OTHERS[name] if name in OTHERS else {**KEPT, **REENCODED}[name][0]


@pytest.mark.parametrize("name", [*KEPT, *REENCODED, *OTHERS])
def test_original_keeps_every_byte_of_what_all_engines_decode(name: str) -> None:
    data = file(name)
    stored = convert_image(data, "original")
    assert (stored.width, stored.height) == open_image(data).size
    is_kept = name not in ("gif", "tiff", "ppm") and "animated" not in name
    assert (stored.data == data) == is_kept
    if not is_kept:
        assert stored.data[:4] == b"\x89PNG"
        assert np.array_equal(pixels(stored.data), pixels(data))
        assert convert_image(data, "original", reencode=True).data[:2] == b"\xff\xd8"


def twelve_bit() -> bytes:
    data = bytearray(jpeg(IMAGE))
    data[data.index(b"\xff\xc0") + 4] = 12
    return bytes(data)


def huge() -> bytes:
    data = bytearray(jpeg(IMAGE))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", 13_378, 13_377)
    assert 13_378 * 13_377 > MAX_PIXELS > 13_376 * 13_377
    return bytes(data)


def unusable_table(bits: int, symbol: int) -> bytes:
    """A JPEG with one more code, of this many bits, in its first Huffman table (DC, luma). No coefficient uses it."""
    data = bytearray(jpeg(IMAGE))
    at = data.index(b"\xff\xc4") + 2
    assert list(data[at : at + 19]) == [0, 31, 0, 0, 1, 5, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0]
    data[at + 1] += 1
    data[at + 2 + bits] += 1
    data[at + 31 : at + 31] = bytes([symbol])
    return bytes(data)


UNREADABLE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "an empty file"),
    "text": (b"no image", "not an image"),
    "truncated": (jpeg(IMAGE)[:-900], "truncated"),
    "no end marker": (jpeg(IMAGE)[:-2], "truncated"),
    "truncated header": (jpeg(IMAGE)[:100], "."),
    "truncated png": (saved(COLOUR, "PNG")[:-4000], "truncated"),
    "12 bits": (twelve_bit(), "."),
    "too many pixels": (huge(), "pixels"),
    "no quantization table": (jpeg(IMAGE).replace(b"\x03\x01\x22\x00", b"\x03\x01\x22\x02"), "broken"),
    "a code of ones only": (unusable_table(9, 12), "broken"),
    "a DC difference of 16 bits": (unusable_table(10, 16), "broken"),
    "32-bit integers": (saved(Image.fromarray(np.asarray(GREY).astype(np.int32)), "TIFF"), "no defined range"),
    "floating-point": (saved(Image.fromarray(np.asarray(GREY) / np.float32(255)), "TIFF"), "no defined range"),
    "too wide for a JPEG": (saved(Image.new("L", (65_600, 1)), "PNG"), "more than a JPEG can hold"),
}


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", UNREADABLE)
def test_unusable_images_are_named_in_one_line(name: str, profile: str) -> None:
    data, words = UNREADABLE[name]
    if name == "too wide for a JPEG" and profile != "compact":
        assert convert_image(data, profile).data == data
        return
    with pytest.raises(UnreadableError, match=words) as caught:
        convert_image(data, profile)
    assert "\n" not in str(caught.value)
    assert str(caught.value)


def segment(marker: int, payload: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(payload) + 2) + payload


def malformed(extra: bytes, jfif: bool = True) -> bytes:
    """A JPEG with a segment that libjpeg ignores, in place of its JFIF segment or after it."""
    data = jpeg(IMAGE)
    return data[:20] + extra + data[20:] if jfif else data[:2] + extra + data[20:]


JFIF, ADOBE, PHOTOSHOP = b"JFIF\0\1\1\0\0\1\0\1\0\0", b"Adobe\0\x64\0\0\0\0\1", b"Photoshop 3.0\x008BIM\x03\xed"
MALFORMED = {
    **{f"JFIF {n}": malformed(segment(0xE0, JFIF[:n]), jfif=False) for n in (0, 4, 5, 7, 9, 13)},
    **{f"Adobe {n}": malformed(segment(0xEE, ADOBE[:n])) for n in (5, 6, 7, 11)},
    **{f"Adobe {n} without JFIF": malformed(segment(0xEE, ADOBE[:n]), jfif=False) for n in (5, 6, 11)},
    "a second JFIF": malformed(segment(0xE0, JFIF[:5])),
    "ICC": malformed(segment(0xE2, b"ICC_PROFILE\0")),
    "Photoshop": malformed(segment(0xED, PHOTOSHOP)),
    "a table's name": malformed(segment(0xEB, b"CROPFEED\1")),
    "fill bytes": jpeg(IMAGE).replace(b"\xff\xdb", b"\xff\xff\xdb").replace(b"\xff\xc4", b"\xff\xff\xff\xc4"),
}


def dali_pixels(images: list[bytes]) -> list[npt.NDArray[np.uint8]]:
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=len(images), num_threads=1, device_id=None)
    def graph() -> object:
        encoded = fn.external_source(source=lambda: [np.frombuffer(data, np.uint8) for data in images], batch=True)
        return fn.decoders.image(encoded, device="cpu", adjust_orientation=False)  # as in the engine

    pipeline = graph()
    pipeline.build()
    (found,) = pipeline.run()
    return [np.array(found.at(i)) for i in range(len(images))]


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_stored_of_a_malformed_header_can_be_read(name: str, profile: str) -> None:
    data = MALFORMED[name]
    stored = convert_image(data, profile)
    assert open_image(stored.data).size == (stored.width, stored.height)
    if profile == "compact":
        assert_opens_at_the_crop(stored)
        return
    assert np.array_equal(pixels(stored.data), simplejpeg.decode_jpeg(jpeg(IMAGE)))
    if profile == "lossless":
        assert_opens_at_the_crop(stored)
        assert not any(fact.startswith("re-encoded") for fact in stored.facts)
    else:
        assert stored.data == data or stored.facts == ("malformed metadata, removed",)


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["lossless", "original"])
def test_dali_reads_what_is_stored_of_a_malformed_header(profile: str) -> None:
    for decoded in dali_pixels([convert_image(data, profile).data for data in MALFORMED.values()]):
        assert np.array_equal(decoded, pixels(jpeg(IMAGE)))


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["lossless", "original"])
def test_dali_decodes_unusual_jpegs_as_pillow_does(profile: str) -> None:
    names = ("arithmetic", "cmyk", "ycck", "progressive cmyk", "luma 1 x 4", "a scan a component")
    stored = [convert_image(KEPT[name][0], profile).data for name in names]
    for name, found in zip(names, dali_pixels(stored), strict=True):
        assert np.array_equal(found, pixels(KEPT[name][0])), name


def many_scans(scans: int, metadata: bytes = b"") -> bytes:
    """A progressive JPEG with its last scan repeated."""
    data = saved(GREY, progressive=True)
    last = data[data.rindex(b"\xff\xc4") : -2]
    return data[:2] + metadata + data[2:-2] + last * (scans - data.count(b"\xff\xda")) + b"\xff\xd9"


@pytest.mark.parametrize("profile", PROFILES)
def test_images_of_too_many_scans_are_left_out(profile: str) -> None:
    """Each scan is a pass over the image: a small file could take minutes."""
    with pytest.raises(UnreadableError, match="more than 100 scans"):
        convert_image(many_scans(101), profile)
    stored = np.frombuffer(many_scans(101), np.uint8)
    windows, out = np.array([[8.0, 8.0, 40.0, 40.0]]), np.empty((1, 32, 32, 3), np.uint8)
    with pytest.raises(CorruptImageError, match="more than 100 scans"):
        Decoder().make_views(stored, 133, 205, windows, np.zeros(1, np.bool_), out)
    assert why_corrupt(stored) == "a JPEG of more than 100 scans"


def test_only_scans_are_counted_as_scans() -> None:
    """Metadata, thumbnails, and a video after the image can contain the marker's bytes."""
    looks_like = b"\xff\xda\0\2" * 5000
    whole = many_scans(100, segment(0xE5, looks_like)) + looks_like
    assert convert_image(whole, "original").data == whole


@pytest.mark.parametrize("profile", PROFILES)
def test_an_image_that_needs_too_much_memory_is_left_out(profile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    for module, name, data in ((images, "transcode", jpeg(IMAGE)), (Image.Image, "convert", saved(COLOUR, "TIFF"))):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, fail)
            if (name, profile) == ("transcode", "original"):
                continue
            with pytest.raises(UnreadableError, match="more memory than there is"):
                convert_image(data, profile)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "GIF", "WEBP", "BMP"])
def test_small_files_of_huge_images_are_left_out(kind: str, profile: str) -> None:
    """The size in the header is changed, as in a decompression bomb. The reason comes at once, and without the memory."""
    data = bytearray(saved(Image.new("L", (64, 48)), kind, **({"lossless": True} if kind == "WEBP" else {})))
    if kind == "PNG":
        data[16:24] = struct.pack(">II", 60_000, 60_000)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif kind == "TIFF":
        for tag in (256, 257):
            at = data.index(struct.pack("<HHI", tag, 4, 1)) + 8
            data[at : at + 4] = struct.pack("<I", 60_000)
    elif kind == "GIF":
        data[6:10] = struct.pack("<HH", 60_000, 60_000)
    elif kind == "WEBP":
        at = data.index(b"VP8L") + 9
        data[at : at + 4] = struct.pack("<I", 16_383 << 14 | 16_383)
    else:
        data[18:26] = struct.pack("<ii", 60_000, 60_000)
    tracemalloc.start()
    with pytest.raises(UnreadableError):
        convert_image(bytes(data), profile)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_broken_metadata_is_reported_and_harmless() -> None:
    whole = saved(COLOUR, exif=exif(3))
    at = whole.index(b"Exif")
    broken_exif = whole[: at + 14] + b"\xff\xff" + whole[at + 16 :]  # more tags than there are bytes
    broken_xmp = saved(COLOUR, xmp=b"<x:xmpmeta xmlns:x='adobe:ns:meta/'><unclosed>")
    sound_xmp = saved(COLOUR, xmp=b"<x:xmpmeta xmlns:x='adobe:ns:meta/'></x:xmpmeta>\n")
    for data, expected in ((broken_exif, True), (broken_xmp, True), (sound_xmp, False)):
        stored = convert_image(data, "lossless")
        assert ("broken metadata" in stored.facts) == expected
        assert np.array_equal(pixels(stored.data), pixels(data))


MUTATE = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
import simplejpeg
from pipeline.convert.images import UnreadableError, convert_image
from pipeline.jpeg.region import RegionError, cut
from tests.helpers import SUBSAMPLINGS, jpeg, mutate, random_image

assert __import__("numba").config.BOUNDSCHECK == 1
rng = np.random.default_rng(int(sys.argv[2]))
kept = refused = cuts = 0
for trial in range(int(sys.argv[3])):
    pixels = random_image(int(rng.integers(1, 90)), int(rng.integers(1, 90)), trial)
    mutant = mutate(jpeg(pixels, SUBSAMPLINGS[trial % 6], int(rng.integers(20, 100))), rng, trial % 5)
    try:
        stored = convert_image(mutant, "lossless" if trial % 7 else "compact")
    except UnreadableError:
        refused += 1
        continue
    kept += 1
    top, left = int(rng.integers(stored.height)), int(rng.integers(stored.width))
    bottom, right = int(rng.integers(top, stored.height)) + 1, int(rng.integers(left, stored.width)) + 1
    data = np.frombuffer(stored.data, np.uint8)
    piece = cut(data, top, left, bottom, right)
    found = simplejpeg.decode_jpeg(piece.jpeg.tobytes(), "RGB", fastdct=False, fastupsample=False, strict=True)
    whole = simplejpeg.decode_jpeg(stored.data, "RGB", fastdct=False, fastupsample=False, strict=True)
    top_in, left_in = top - piece.top, left - piece.left
    inside = found[top_in : top_in + bottom - top, left_in : left_in + right - left]
    assert np.array_equal(inside, whole[top:bottom, left:right]), trial
    broken = np.frombuffer(mutate(stored.data, rng, 3 if trial % 3 == 0 else 0), np.uint8)  # as faulty storage would
    try:
        simplejpeg.decode_jpeg(cut(broken, top, left, bottom, right).jpeg.tobytes())
        cuts += 1
    except (RegionError, ValueError):
        pass
print(refused, kept, cuts)
"""


@pytest.mark.slow
def test_mutants_are_stored_or_refused(tmp_path: Path) -> None:
    """Bit flips, truncations and stray markers, with bounds checking on: each image is left out, or stored and cut exactly."""
    refused, kept, cuts = run_mutants(MUTATE, tmp_path)
    assert min(refused, kept, cuts) > (refused + kept) / 10
    print(f"mutants: {refused} refused, {kept} stored and cut exactly, {cuts} of those decoded after more damage")


def test_region_errors_are_value_errors() -> None:
    assert issubclass(RegionError, ValueError)
