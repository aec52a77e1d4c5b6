"""Region-addressable JPEGs: cuts decode to the pixels of the whole image, and the bytes follow the format's description."""

from __future__ import annotations

import heapq
import io
import struct
import tarfile

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from pipeline.jpeg import huffman, region, transcode
from pipeline.jpeg.header import NotBaselineError
from pipeline.jpeg.region import RegionError, cut
from pipeline.jpeg.transcode import choose_interval
from tests.helpers import SHARED, SUBSAMPLINGS, jpeg, open_image, random_image

SIZES = ((1, 1), (1, 40), (40, 1), (7, 9), (8, 8), (16, 16), (17, 33), (64, 200), (131, 97), (375, 500))


def decode(data: bytes) -> np.ndarray:
    """Decode exactly with libjpeg-turbo: slow integer DCT, interpolated chroma. uint8 (H, W, 3), or (H, W, 1) for grey."""
    grey = open_image(data).mode == "L"
    pixels: np.ndarray = simplejpeg.decode_jpeg(data, "GRAY" if grey else "RGB", fastdct=False, fastupsample=False)
    return pixels


def assert_window_exact(whole: np.ndarray, written: bytes, window: tuple[int, int, int, int]) -> None:
    top, left, bottom, right = window
    piece = cut(np.frombuffer(written, np.uint8), top, left, bottom, right)
    assert piece.top <= top
    assert piece.left <= left
    pixels = decode(piece.jpeg.tobytes())
    assert pixels.shape[:2] == (piece.height, piece.width)
    inside = pixels[top - piece.top : bottom - piece.top, left - piece.left : right - piece.left]
    assert np.array_equal(inside, whole[top:bottom, left:right]), (window, whole.shape)


def windows(height: int, width: int, count: int, seed: int) -> list[tuple[int, int, int, int]]:
    """Windows of an image: all of it, corner pixels, strips along the borders, and random ones."""
    rng = np.random.default_rng(seed)
    found = [
        (0, 0, height, width), (0, 0, 1, 1), (height - 1, width - 1, height, width), (0, width - 1, 1, width),
        (height - 1, 0, height, 1), (0, width // 2, height, width // 2 + 1), (height // 2, 0, height // 2 + 1, width),
    ]  # fmt: skip
    for _ in range(count):
        top, bottom = sorted(rng.choice(height + 1, 2, replace=False))
        left, right = sorted(rng.choice(width + 1, 2, replace=False))
        found.append((int(top), int(left), int(bottom), int(right)))
    return found


@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_window_of_every_kind_is_exact(subsampling: str, size: tuple[int, int]) -> None:
    for quality in (30, 90, 100):
        original = jpeg(random_image(*size, seed=quality), subsampling, quality)
        whole = decode(original)
        written = transcode.transcode(original)
        assert np.array_equal(decode(written), whole)
        assert open_image(written).quantization == open_image(original).quantization  # type: ignore[attr-defined]
        for window in windows(*size, count=20, seed=quality):
            assert_window_exact(whole, written, window)


@pytest.mark.parametrize(
    "options", [{"restart_marker_blocks": 1}, {"restart_marker_blocks": 7}, {"restart_marker_rows": 1}, {"optimize": True}]
)
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0"])
def test_originals_with_restart_markers_and_optimal_tables(options: dict[str, int], subsampling: str) -> None:
    stream = io.BytesIO()
    Image.fromarray(random_image(133, 205)).save(stream, "JPEG", quality=85, subsampling=subsampling, **options)
    original = stream.getvalue()
    written = transcode.transcode(original)
    whole = decode(original)
    assert np.array_equal(decode(written), whole)
    for window in windows(133, 205, count=20, seed=1):
        assert_window_exact(whole, written, window)


def test_transcoding_twice_changes_nothing() -> None:
    written = transcode.transcode(jpeg(random_image(375, 500), "420"))
    assert transcode.transcode(written) == written


def read_format(data: bytes) -> tuple[dict[str, int], list[int], int]:
    """The table's fields, the segment lengths, and the start of the entropy-coded data, read as region.py's docstring says."""
    position, fields = 2, dict[str, int]()
    lengths: list[int] = []
    while True:
        assert data[position] == 0xFF
        marker, size = data[position + 1], int.from_bytes(data[position + 2 : position + 4], "big")
        payload = data[position + 4 : position + 2 + size]
        position += 2 + size
        if marker == 0xEB:
            names = ("version", "size", "interval", "tiles", "rows", "mcu_width", "mcu_height", "count")
            fields = dict(zip(names, struct.unpack("<BBHHHBBI", payload[8:22]), strict=True))
            assert payload[:8] == b"CROPFEED"
            lengths += struct.unpack(f"<{fields['count']}{'H' if fields['size'] == 2 else 'I'}", payload[22:])
        if marker == 0xDD:
            assert int.from_bytes(payload, "big") == fields["interval"]
        if marker == 0xDA:
            return fields, list(lengths), position


@pytest.mark.parametrize(
    ("size", "subsampling"), [((375, 500), "444"), ((375, 500), "420"), ((2100, 2800), "444"), ((8, 2520), "Gray")]
)
def test_the_bytes_follow_the_format_description(size: tuple[int, int], subsampling: str) -> None:
    written = transcode.transcode(jpeg(random_image(*size), subsampling))
    fields, lengths, position = read_format(written)
    mcu = 16 if subsampling == "420" else 8
    assert (fields["version"], fields["mcu_width"], fields["mcu_height"]) == (1, mcu, mcu)
    assert fields["interval"] * fields["tiles"] == -(-size[1] // mcu)
    assert fields["rows"] == -(-size[0] // mcu)
    assert len(lengths) == fields["tiles"] * fields["rows"]
    assert position + sum(lengths) == len(written)
    for number, length in enumerate(lengths):
        position += length
        expected = 0xD9 if number == len(lengths) - 1 else 0xD0 + number % 8
        assert written[position - 2 : position] == bytes([0xFF, expected])


def test_lengths_beyond_16_bits_and_beyond_one_segment() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 8 * 1399, 3), np.uint8)  # 1399 is prime: whole rows
    original = jpeg(noise, "444", 100)
    written = transcode.transcode(original)
    assert read_format(written)[0]["size"] == 4
    assert_window_exact(decode(original), written, (13, 700, 29, 900))
    tall = jpeg(np.random.default_rng(0).integers(0, 256, (8 * 8000, 64), np.uint8).repeat(3).reshape(-1, 64, 3), "Gray", 20)
    tall_written = transcode.transcode(tall)
    fields, lengths, _ = read_format(tall_written)
    assert fields["tiles"] * fields["rows"] == len(lengths) == 8000
    wide = jpeg(np.zeros((8 * 5000, 8 * 64, 3), np.uint8), "444", 50)
    assert len(read_format(transcode.transcode(wide))[1]) == 40_000  # more than 65,511 bytes of lengths
    assert_window_exact(decode(wide), transcode.transcode(wide), (39_990, 500, 40_000, 512))


def test_tile_widths() -> None:
    for mcu_width in (8, 16, 32):
        for mcus in range(1, 700):
            interval = choose_interval(mcus, mcu_width)
            assert mcus % interval == 0
            assert interval == mcus or interval * mcu_width >= 22
    assert choose_interval(63, 8) == 7  # 500 pixels: 56 wide
    assert choose_interval(32, 16) == 4  # 64 pixels rather than 32
    assert choose_interval(62, 8) == 31  # half a row rather than 2 MCUs
    assert choose_interval(47, 8) == 47  # a prime: whole rows


def test_optimal_tables_cost_as_much_as_huffman_codes() -> None:
    """The reference is a plain heap. Where its codes would exceed 16 bits, the table is still valid, and not cheaper."""
    rng = np.random.default_rng(0)
    for trial in range(200):
        counts = np.zeros(257, np.int64)
        symbols = rng.choice(256, rng.integers(1, 120), replace=False)
        counts[symbols] = (
            rng.integers(1, 200, len(symbols)) if trial % 2 else (1.6 ** rng.uniform(0, 40, len(symbols))).astype(int) + 1
        )
        bits, values = huffman.optimal_table(counts)
        assert sorted(values.tolist()) == sorted(symbols.tolist())
        assert int(bits.sum()) == len(symbols)
        sizes = dict(zip(values.tolist(), np.repeat(np.arange(1, 17), bits).tolist(), strict=True))
        kraft = sum(2.0**-size for size in sizes.values())
        assert kraft <= 1 - 2.0 ** -max(sizes.values())  # the code of all ones is left out
        heap = [(0, -1, 0), *((int(counts[symbol]), int(symbol), 0) for symbol in symbols)]  # weight, tie-break, depth
        heapq.heapify(heap)
        cost = deepest = 0
        while len(heap) > 1:
            one, two = heapq.heappop(heap), heapq.heappop(heap)
            cost += one[0] + two[0]
            deepest = max(one[2], two[2]) + 1
            heapq.heappush(heap, (one[0] + two[0], one[1], deepest))
        found = sum(int(counts[symbol]) * size for symbol, size in sizes.items())
        if deepest <= 16:
            assert found == cost
        assert found >= cost


def restarted(step: int) -> bytearray:
    """A JPEG with restart markers. Their numbers increase by `step`."""
    stream = io.BytesIO()
    Image.fromarray(random_image(64, 96)).save(stream, "JPEG", quality=85, subsampling="4:4:4", restart_marker_blocks=4)
    data = bytearray(stream.getvalue())
    places = [i for i in range(data.index(b"\xff\xda"), len(data) - 1) if data[i] == 0xFF and 0xD0 <= data[i + 1] <= 0xD7]
    for number, place in enumerate(places):
        data[place + 1] = 0xD0 + number * step % 8
    return data


def test_damage_around_restart_markers() -> None:
    """Surplus bytes before a marker are skipped, as by decoders. Wrong marker numbers, where decoders guess, are refused."""
    data = restarted(1)
    whole = decode(bytes(data))
    place = data.index(b"\xff\xd3")
    for surplus in (b"\0", bytes(range(1, 40))):
        mutant = bytes(data[:place] + surplus + data[place:])
        assert np.array_equal(np.asarray(open_image(mutant)), whole)
        assert np.array_equal(decode(transcode.transcode(mutant)), whole)
    with pytest.raises(RegionError, match="ends too early"):
        transcode.transcode(bytes(restarted(3)))


def test_metadata_is_dropped_and_the_colour_space_kept() -> None:
    """EXIF and comments are dropped. Adobe's marker, which determines the colour space, is kept."""
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(random_image(80, 90)).save(stream, "JPEG", exif=exif, comment=b"hello", icc_profile=b"x" * 500)
    written = transcode.transcode(stream.getvalue())
    assert b"Exif" not in written
    assert b"hello" not in written
    assert np.array_equal(decode(written), decode(stream.getvalue()))
    rgb = io.BytesIO()
    Image.fromarray(random_image(80, 90)).save(rgb, "JPEG", keep_rgb=True)
    assert b"Adobe" in rgb.getvalue()
    written = transcode.transcode(rgb.getvalue())
    assert np.array_equal(np.asarray(open_image(written)), np.asarray(open_image(rgb.getvalue())))
    assert_window_exact(decode(rgb.getvalue()), written, (10, 20, 50, 60))


def test_files_other_than_baseline_jpegs_are_refused_with_a_reason() -> None:
    image = Image.fromarray(random_image(60, 70))

    def saved(kind: str) -> bytes:
        stream = io.BytesIO()
        image.save(stream, kind)
        return stream.getvalue()

    for data, words in (
        (saved("JPEG").replace(b"\xff\xc0", b"\xff\xc5"), "hierarchical"),
        (saved("JPEG").replace(b"\xff\xc0", b"\xff\xc3"), "lossless"),
        (saved("JPEG").replace(b"\1\x22\0\2\x11", b"\1\x33\0\2\x11"), "11 blocks in an MCU"),
        (saved("PNG"), "not a JPEG"),
        (b"", "not a JPEG"),
    ):
        with pytest.raises(NotBaselineError, match=words):
            transcode.transcode(data)


def test_impossible_cuts_are_refused_with_a_reason() -> None:
    original = jpeg(random_image(60, 70))
    written = np.frombuffer(transcode.transcode(original), np.uint8)
    for data, window, words in (
        (np.frombuffer(original, np.uint8), (0, 0, 8, 8), "no table"),
        (written[:4], (0, 0, 8, 8), "no table"),
        (written[:-100], (0, 0, 8, 8), "does not match the table"),
        (written, (0, 0, 61, 8), "outside"),
        (written, (-1, 0, 5, 8), "outside"),
        (written, (5, 5, 5, 8), "outside"),
    ):
        with pytest.raises(RegionError, match=words):
            cut(data, *window)


def test_cut_into_writes_to_the_callers_buffer() -> None:
    """`cut_into`, for compiled engines, needs a buffer of exactly the cut's bytes, refuses a smaller one, and writes nothing
    beyond it."""
    written = np.frombuffer(transcode.transcode(jpeg(random_image(90, 300), "444")), np.uint8)
    expected = cut(written, 20, 70, 60, 140)
    size, place = len(expected.jpeg), np.zeros(4, np.int64)
    out = np.full(size + 1, 77, np.uint8)
    assert region.cut_into(written, 20, 70, 60, 140, out[:size], place) == size
    assert np.array_equal(out[:size], expected.jpeg)
    assert place.tolist() == list(expected[1:])
    out[:] = 77
    assert region.cut_into(written, 20, 70, 60, 140, out[: size - 1], place) == region.NO_SPACE
    assert (out == 77).all()


@pytest.mark.skipif(not SHARED.exists(), reason="the real ImageNet images are not on this machine")
def test_real_images_are_transcoded_losslessly_and_grow_by_at_most_1_percent() -> None:
    before = after = 0
    with tarfile.open(SHARED / "imagenet-400.tar") as tar:
        for number, member in enumerate(member for member in tar if member.isfile()):
            if number % 8:
                continue
            original = tar.extractfile(member).read()  # type: ignore[union-attr]
            try:
                written = transcode.transcode(original)
            except NotBaselineError:
                continue
            before, after = before + len(original), after + len(written)
            whole = decode(original)
            assert np.array_equal(decode(written), whole)
            for window in windows(whole.shape[0], whole.shape[1], count=3, seed=number):
                assert_window_exact(whole, written, window)
    assert before > 4_000_000
    assert after <= 1.01 * before
