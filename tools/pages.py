"""Self-contained HTML pages: style and helpers that the profiler's report and the report on training runs share."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from html import escape

BASE = """
:root { --ink: #1f2933; --grey: #5c6770; --line: #e3e7ea; --paper: #fff; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 900px; padding: 32px 24px 48px; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; font-variant-numeric: tabular-nums; }
header p { margin: 0; color: var(--grey); font-size: 14px; overflow-wrap: anywhere; }
h1 { margin: 10px 0 0; font-size: 21px; line-height: 1.3; }
h2 { margin: 40px 0 8px; font-size: 17px; line-height: 1.3; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; line-height: 1.35; }
th, td { padding: 5px 0 5px 20px; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top;
  white-space: nowrap; }
th { color: var(--grey); font-weight: 400; font-size: 13px; vertical-align: bottom; }
.text, .note { text-align: left; } th:first-child, td:first-child { padding-left: 0; }
.under { margin: 8px 0 0; color: var(--grey); font-size: 13px; max-width: 760px; overflow-wrap: anywhere; }
@media (max-width: 520px) { body { padding: 20px 14px 32px; } th, td { padding-left: 14px; } }
@media print { body { max-width: none; padding: 0; font-size: 11pt; } figure, tr { break-inside: avoid; }
  h2 { break-after: avoid; } .wide { overflow: visible; } table { font-size: 8.5pt; } th, td { padding-left: 10px; } }
"""


def page(title: str, css: str, parts: Iterable[str]) -> str:
    """A complete document. title: plain text. css: added to BASE. parts: the body's HTML."""
    head = '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    style = f"<title>{escape(title)}</title><style>{BASE}{css}</style></head><body>"
    return "\n".join(["<!DOCTYPE html>", head, style, *parts, "</body></html>"]) + "\n"


def cell(tag: str, text: str, is_text: bool = False) -> str:
    """A table cell, th or td. Text is aligned left, numbers right."""
    return f"<{tag}{' class=text' if is_text else ''}>{escape(text)}</{tag}>"


def embed_image(alt: str, data: bytes, kind: str = "png") -> str:
    """An <img> that contains the image's bytes."""
    return f'<img alt="{escape(alt)}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'
