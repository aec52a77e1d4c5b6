"""The crops of `Job` for peers that compile their loops with numba. This module needs only numpy."""

from __future__ import annotations

from typing import Any

import numpy as np


def jitter_crop(height: Any, width: Any, scale: Any, ratio: Any) -> Any:
    """Draw a crop: top, left, height, width in source pixels. FFCV and slipstream compile this function.

    scale: lowest and highest S. ratio: the crop's side, twice.
    """
    short = np.random.randint(scale[0], scale[1] + 1)
    zoom = min(height, width) / short
    resized_height, resized_width = int(height / zoom + 0.5), int(width / zoom + 0.5)
    top = (np.random.randint(0, resized_height - ratio[0] + 1) - resized_height / 2) * zoom + height / 2
    left = (np.random.randint(0, resized_width - ratio[0] + 1) - resized_width / 2) * zoom + width / 2
    first_row, first_column = max(int(top + 0.5), 0), max(int(left + 0.5), 0)
    last_row, last_column = min(int(top + ratio[0] * zoom + 0.5), height), min(int(left + ratio[0] * zoom + 0.5), width)
    return first_row, first_column, max(last_row - first_row, 1), max(last_column - first_column, 1)
