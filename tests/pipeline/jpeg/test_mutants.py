"""Damaged JPEGs: no function reads beyond its buffers, and what is decoded is what libjpeg-turbo decodes, too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.helpers import ROOT, clean_environment


def attack(environment: dict[str, str]) -> Counter[tuple[str, str, str]]:
    """Run mutants.py with $CROPFEED_MUTANTS mutants: how often each function had each outcome in each zone."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.pipeline.jpeg.mutants", "1", os.environ.get("CROPFEED_MUTANTS", "1000")],
        cwd=ROOT, env=clean_environment() | environment, capture_output=True, text=True, timeout=1800, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = Counter[tuple[str, str, str]]()
    for name, count in json.loads(result.stdout).items():
        function, zone, outcome = name.split(" ", 2)
        found[function, zone, outcome] = count
    return found


@pytest.mark.slow
@pytest.mark.parametrize("bounds", [True, False], ids=["bounds checks", "guard pages alone"])
def test_damaged_files_are_refused_or_decoded_as_by_libjpeg_turbo(bounds: bool, tmp_path: Path) -> None:
    found = attack({"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)} if bounds else {})
    differs = Counter[str]()
    for (_, zone, outcome), count in found.items():
        differs[zone] += count * (outcome == "differs")
    assert differs["table"] == 0
    assert differs.total() <= found.total() / 500  # damaged coefficients: libjpeg-turbo resynchronizes, and overflows in 16 bits
    for function in ("decode", "cut", "make_views", "transcode"):
        assert {"refused", "exact", "agreed"} <= {outcome for name, _, outcome in found if name == function}
