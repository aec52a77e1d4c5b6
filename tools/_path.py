"""Imported first by every script here, so that `python tools/NAME.py` finds `pipeline` and `model` without an install."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
