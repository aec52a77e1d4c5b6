"""Scripts around training: shards, profiler, doctor, evaluation, export, report. `python tools/NAME.py --help` describes each."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
