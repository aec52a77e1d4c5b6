"""Imported first by every script in this folder, so that Python finds the checkout's packages without an install.

Python puts a script's folder first in sys.path. This moves the folder to the end, so that no module in it shadows another one.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:] = [str(ROOT), *(path for path in sys.path if path not in (str(ROOT), str(HERE))), str(HERE)]
