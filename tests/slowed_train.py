"""train.py with storage slowed down to $MEGABYTES_PER_S."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train
from pipeline.cli import run_cli
from tools.profiler.planted import slow_reader

if __name__ == "__main__":
    with slow_reader(float(os.environ["MEGABYTES_PER_S"])):
        run_cli(train.main)
