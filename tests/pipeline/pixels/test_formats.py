from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError

from pipeline.convert.images import UnreadableError, convert_image
from pipeline.pixels.decoder import why_corrupt
from pipeline.pixels.formats import unreadable_format


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC, which Pillow cannot read; convert it to JPEG"),
        (b"\xff\x0a\x7a\x05\x80", "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"II*\0\x10\0\0\0CR\x02\0", "camera raw"),
        (b"%PDF-1.7\n", "PDF"),
        (b"\0\0\0\x20ftypisom\0\0\x02\0", "a video"),
        (b"\x1a\x45\xdf\xa3\x01", "a video"),
        (b'<?xml version="1.0"?>\n<svg xmlns=""/>', "SVG"),
        (b"<!DOCTYPE html><html>404", "a web page (HTML), which Pillow cannot read; download it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "run git lfs pull"),
        (b"", "an empty file"),
    ],
)
def test_formats_that_pillow_cannot_read_are_named(data: bytes, words: str) -> None:
    with pytest.raises(UnidentifiedImageError):
        Image.open(io.BytesIO(data))
    with pytest.raises(UnreadableError) as refused:
        convert_image(data, "lossless")
    assert words in str(refused.value)
    assert words in str(why_corrupt(np.frombuffer(data, np.uint8)))


def test_other_data_has_no_name() -> None:
    assert unreadable_format(b"junk" * 1000) == ""
