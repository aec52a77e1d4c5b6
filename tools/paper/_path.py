"""Imported first by every script here, so that our packages are found from the checkout's root without an install.

This folder, which Python puts first, goes to the end: a module here must not hide another one of its name.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:] = [str(ROOT), *(place for place in sys.path if place not in (str(ROOT), str(HERE))), str(HERE)]
