from __future__ import annotations

import base64
import io
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import simplejpeg
from PIL import Image

from pipeline.convert import images
from pipeline.convert.images import MAX_PIXELS, PROFILES, ConvertedImage, UnreadableError, convert_image
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


def damaged() -> bytes:
    """A JPEG with damaged entropy-coded data, which decoders accept with a warning."""
    data = bytearray(jpeg(IMAGE, "420"))
    middle = len(data) // 2
    data[middle:middle] = b"\xff\xd3"  # a restart marker where there are none
    return bytes(data)


COLOUR, GREY = Image.fromarray(IMAGE), Image.fromarray(IMAGE).convert("L")
DEEP = Image.fromarray((np.asarray(GREY).astype(np.uint16) << 8) + 77)
# name -> the file, and a word of the fact that the report must contain (None: no fact)
REENCODED: dict[str, tuple[bytes, str]] = {
    "arithmetic": (ARITHMETIC, "arithmetic"),
    "cmyk": (saved(COLOUR.convert("CMYK")), "4 components"),
    "ycck": (ycck(), "4 components"),
    "damaged": (damaged(), "re-encoded"),
    "png": (saved(COLOUR, "PNG"), "PNG"),
    "grey png": (saved(GREY, "PNG"), "PNG"),
    "palette png": (saved(COLOUR.quantize(64), "PNG"), "PNG"),
    "rgba png": (saved(COLOUR.convert("RGBA"), "PNG"), "PNG"),
    "webp": (saved(COLOUR, "WEBP", lossless=True), "WEBP"),
    "bmp": (saved(COLOUR, "BMP"), "BMP"),
    "gif": (saved(COLOUR.quantize(64), "GIF"), "GIF"),
    "tiff": (saved(COLOUR, "TIFF"), "TIFF"),
}
KEPT: dict[str, tuple[bytes, str | None]] = {
    **{name: (jpeg(IMAGE, name), None) for name in SUBSAMPLINGS},
    "adobe rgb": (saved(COLOUR, keep_rgb=True), "Adobe RGB"),
    "orientation": (saved(COLOUR, exif=exif(6)), "orientation"),
    "upright": (saved(COLOUR, exif=exif(1)), None),
    "restart markers": (saved(COLOUR, restart_marker_blocks=3), None),
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
    assert np.array_equal(np.asarray(stored.pixels), pixels(data))
    assert (stored.height, stored.width) == IMAGE.shape[:2]
    assert len(stored.facts) == (fact is not None)
    assert fact is None or fact in stored.facts[0]
    assert_opens_at_the_crop(stored)


@pytest.mark.parametrize("name", REENCODED)
def test_images_that_cannot_be_lossless_are_re_encoded_and_reported(name: str) -> None:
    data, fact = REENCODED[name]
    stored = convert_image(data, "lossless")
    decoded = open_image(data).convert("L" if "grey" in name else "RGB")
    assert np.array_equal(pixels(stored.data), pixels(saved(decoded, quality=95, subsampling="4:4:4")))
    assert np.array_equal(
        np.asarray(open_image(data).convert("RGB")), np.asarray(Image.fromarray(np.asarray(stored.pixels)).convert("RGB"))
    )
    assert fact in stored.facts[-1]
    assert stored.facts[-1].startswith("re-encoded: ")
    assert ("CMYK" in stored.facts) == (name in ("cmyk", "ycck"))
    assert open_image(stored.data).mode == ("L" if "grey" in name else "RGB")
    assert_opens_at_the_crop(stored)


@pytest.mark.parametrize("profile", ["lossless", "original"])
@pytest.mark.parametrize("kind", ["PNG", "PPM", "TIFF"])
def test_sixteen_bit_grays_are_scaled_not_clipped(kind: str, profile: str) -> None:
    """No engine gets such an image, as each would convert it in another way."""
    stored = convert_image(saved(DEEP, kind), profile)
    assert np.array_equal(pixels(stored.data), pixels(saved(GREY, quality=95)))


def test_pillow_decodes_stored_sixteen_bit_grays_in_the_same_way() -> None:
    """In shards that an earlier version has made."""
    decoded = decode_by_pillow(np.frombuffer(saved(DEEP, "PNG"), np.uint8))
    assert np.array_equal(decoded, np.asarray(GREY.convert("RGB")))


def turned_411() -> bytes:
    """A JPEG with the sampling factors of a 4:1:1 one turned by 90 degrees, luma 1 x 4. simplejpeg has no name for them."""
    data = bytearray(jpeg(random_image(64, 64), "411"))
    at = data.index(b"\xff\xc0") + 11
    assert data[at] == 0x41
    data[at] = 0x14
    return bytes(data)


@pytest.mark.parametrize("profile", PROFILES)
def test_unusual_sampling_factors(profile: str) -> None:
    stored = convert_image(turned_411(), profile)
    assert np.abs(pixels(stored.data) - pixels(turned_411())).mean() < (12 if profile == "compact" else 4)
    windows, out = np.array([[8.0, 8.0, 40.0, 40.0]]), np.empty((1, 32, 32, 3), np.uint8)
    Decoder().make_views(np.frombuffer(stored.data, np.uint8), 64, 64, windows, np.zeros(1, np.bool_), out)
    assert np.array_equal(out[0], pixels(stored.data)[8:40, 8:40])


@pytest.mark.parametrize("name", ["420", "444", "Gray", "cmyk", "png", "damaged", "orientation"])
def test_compact_is_small_and_region_addressable(name: str) -> None:
    data, _ = KEPT.get(name) or REENCODED[name]
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


@pytest.mark.parametrize("name", [name for name in (*KEPT, *REENCODED) if name not in ("gif", "tiff")])
def test_original_keeps_every_byte(name: str) -> None:
    data, _ = KEPT.get(name) or REENCODED[name]
    stored = convert_image(data, "original")
    assert stored.data == data
    assert (stored.width, stored.height) == open_image(data).size


@pytest.mark.parametrize("name", ["gif", "tiff"])
def test_original_converts_formats_that_no_engine_decodes(name: str) -> None:
    stored = convert_image(REENCODED[name][0], "original")
    assert stored.data[:2] == b"\xff\xd8"
    assert name.upper() in stored.facts[-1]


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


UNREADABLE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "an empty file"),
    "text": (b"no image", "not an image"),
    "truncated": (jpeg(IMAGE)[:-900], "truncated"),
    "no end marker": (jpeg(IMAGE)[:-2], "truncated"),
    "truncated header": (jpeg(IMAGE)[:100], "."),
    "truncated png": (saved(COLOUR, "PNG")[:-4000], "truncated"),
    "12 bits": (twelve_bit(), "."),
    "too many pixels": (huge(), "pixels"),
    "32-bit integers": (saved(Image.fromarray(np.asarray(GREY).astype(np.int32)), "TIFF"), "no defined range"),
    "floating-point": (saved(Image.fromarray(np.asarray(GREY) / np.float32(255)), "TIFF"), "no defined range"),
    "too wide for a JPEG": (saved(Image.new("L", (65_600, 1)), "PNG"), "more than a JPEG can hold"),
}


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", UNREADABLE)
def test_unusable_images_are_named_in_one_line(name: str, profile: str) -> None:
    data, words = UNREADABLE[name]
    if name == "too wide for a JPEG" and profile == "original":
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
        return fn.decoders.image(encoded, device="cpu")

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
