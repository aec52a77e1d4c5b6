"""Imported first by every script in this folder: like tools/_path.py, so that Python finds the checkout's packages."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parents[1]), *(path for path in sys.path if path != str(HERE)), str(HERE)]
