"""What the bytes of a file say without a decoder: names of formats that Pillow cannot read, so that a message can say more than
"not an image", and whether all engines decode a PNG or WebP to the same pixels.
"""

from __future__ import annotations

import re
import zlib

_MAGIC = (  # what a file begins with, after `skip` bytes
    (4, rb"ftyp(hei[cxms]|hev[cxms]|mif1|msf1)", "HEIC"),
    (4, rb"ftypavi[fs]", "AVIF"),
    (4, rb"ftypcrx ", "camera raw (CR3)"),
    (4, rb"ftyp|moov|mdat", "a video (MP4 or QuickTime)"),
    (0, rb"\xff\x0a|\0\0\0\x0cJXL ", "JPEG XL"),
    (0, rb"\x49\x49\x2a\0.{4}CR", "camera raw (CR2)"),
    (0, rb"FUJIFILMCCD-RAW|IIRO|IIRS|MMOR|IIU\0|FOVb", "camera raw"),
    (0, rb"\x1a\x45\xdf\xa3|RIFF.{4}AVI |\0\0\x01[\xb3\xba]|FLV", "a video"),
    (0, rb"%PDF-", "PDF"),
    (0, rb"8BPS", "Photoshop's PSD"),
    (0, rb"\s*(<\?xml.*?)?<svg", "SVG"),
    (0, rb"\s*(<!doctype html|<html)", "a web page (HTML)"),
    (0, rb"version https://git-lfs", "a Git LFS pointer"),
    (0, rb"PK\x03\x04|\x1f\x8b|Rar!|7z\xbc\xaf", "an archive"),
)
_REMEDIES = {"a Git LFS pointer": "run git lfs pull", "a web page (HTML)": "download it again", "an archive": "unpack it"}


def unreadable_format(data: bytes) -> str:
    """Of an image that Pillow cannot open: its format and what helps, in one line; "" if it is none that we know."""
    head = bytes(data[:512])
    for skip, pattern, name in _MAGIC:
        if re.match(pattern, head[skip:], re.DOTALL | re.IGNORECASE):
            return f"{name}, which Pillow cannot read; {_REMEDIES.get(name, 'convert it to JPEG')}"
    return "" if len(data) else "an empty file"


_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = (b"IHDR", b"PLTE", b"IDAT", b"IEND")  # chunks that decide the pixels


def _png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """Name and bytes (length, name, content, checksum) of each chunk of a PNG, up to its end. The last may be cut off."""
    chunks: list[tuple[bytes, bytes]] = []
    at = len(_PNG)
    while at < len(data) and (not chunks or chunks[-1][0] != b"IEND"):
        end = at + 12 + int.from_bytes(data[at : at + 4])
        chunks.append((data[at + 4 : at + 8], data[at:end]))
        at = end
    return chunks


def is_plain_png(data: bytes) -> bool:
    """Whether it is a PNG of 8-bit RGB or gray pixels, without transparency, animation or wrong checksums.

    Pillow ignores wrong checksums of pixels, libpng does not. Of an animation, Pillow decodes the default image, DALI the first
    frame.
    """
    if not data.startswith(_PNG) or data[24:25] != b"\x08" or data[25:26] not in (b"\0", b"\2"):
        return False
    chunks = _png_chunks(data)
    names = {name for name, _ in chunks}
    return (
        (chunks[0][0], chunks[-1][0]) == (b"IHDR", b"IEND")
        and not names & {b"tRNS", b"acTL"}
        and all(name in _PNG_PIXELS or name[:1].islower() for name in names)
        and all(zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:]) for _, chunk in chunks)
    )


def png_without_metadata(data: bytes) -> bytes:
    """A PNG with only what decides its pixels; without transparency, too."""
    return _PNG + b"".join(chunk for name, chunk in _png_chunks(data) if name in _PNG_PIXELS)


def is_lossy_webp(data: bytes) -> bool:
    """Whether it is a WebP of one lossy image, without animation."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return False
    at = 12
    while at + 8 <= len(data) and data[at : at + 4] in (b"VP8X", b"ICCP", b"ALPH"):  # others follow the image
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        at += 8 + size + size % 2
    return data[at : at + 4] == b"VP8 "
