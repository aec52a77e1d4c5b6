"""The bar chart of the README, from the same rows as its table: docs/images/comparison.svg."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

WIDTH, LABELS, ROW, BAR = 860, 270, 34, 22  # of the chart, of the labels' column, height of a row, of its bar
STYLE = """
text { font: 14px system-ui, sans-serif; fill: #24292f } .value { font-weight: 600 }
.ours { fill: #0a6ebd } .other { fill: #9aa5ad }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .ours { fill: #4ba6e0 } }
"""


def bar_chart(title: str, bars: Sequence[tuple[str, float, bool]]) -> str:
    """A chart of horizontal bars, as SVG. bars: label, value, whether it is Cropfeed's."""
    largest, height = max(value for _, value, _ in bars), ROW * (len(bars) + 1) + 10
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">',
        f"<style>{STYLE}</style>",
        f'<text x="0" y="18">{escape(title)}</text>',
    ]
    for place, (label, value, ours) in enumerate(bars):
        top, length = ROW * (place + 1), (WIDTH - LABELS - 70) * value / largest
        middle = top + BAR / 2 + 5
        lines += [
            f'<text x="{LABELS - 10}" y="{middle:g}" text-anchor="end">{escape(label)}</text>',
            f'<rect class="{"ours" if ours else "other"}" x="{LABELS}" y="{top}" width="{length:.1f}" height="{BAR}" rx="3"/>',
            f'<text class="value" x="{LABELS + length + 8:.1f}" y="{middle:g}">{value:,.0f}</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])
