"""Names of formats that Pillow cannot read, so that a message can say more than "not an image"."""

from __future__ import annotations

import re

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
