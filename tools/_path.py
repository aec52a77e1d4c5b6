"""Imported first by every script in this folder, so that Python finds the checkout's packages without installation.

Python puts a script's folder first in sys.path. This module moves the folder to the end, so that its modules do not shadow others
of the same name.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:] = [str(ROOT), *(path for path in sys.path if path not in (str(ROOT), str(HERE))), str(HERE)]

import pipeline.starting  # noqa: E402, F401
