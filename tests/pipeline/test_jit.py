"""Compiled code is cached until a source changes. The tests use a package of two modules, and a new process for each run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import jit
from tests.helpers import clean_environment

LOW = """
from pipeline.jit import jit

@jit
def low(x):
    return x + STEP
"""
HIGH = """
from numba import prange
from pipeline.jit import jit
from pipeline.low import low

@jit
def high(x):
    return 10 * low(x)

@jit(parallel=True)
def sums(x):
    for i in prange(len(x)):
        x[i] = low(x[i])
"""
RUN = """
import json, numpy
from pipeline.high import high, sums
numbers = numpy.zeros(3, numpy.int64)
sums(numbers)
print(json.dumps([high(1), numbers.tolist(), len(high.stats.cache_hits), len(sums.stats.cache_hits)]))
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "pipeline"
    folder.mkdir()
    (folder / "__init__.py").touch()
    shutil.copy(jit.__file__, folder)
    (folder / "low.py").write_text(LOW.replace("STEP", "1"))
    (folder / "high.py").write_text(HIGH)
    return folder


def run(package: Path) -> list[object]:
    """Run the package. Returns high(1), three zeros after `sums`, and how many compilations of each function came from the
    cache."""
    environment = clean_environment()
    environment.pop("NUMBA_CACHE_DIR", None)
    result = subprocess.run(
        [sys.executable, "-c", RUN], cwd=package.parent, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    found: list[object] = json.loads(result.stdout)
    return found


@pytest.mark.slow
def test_compiled_code_is_cached_until_a_source_changes(package: Path) -> None:
    assert run(package) == [20, [1, 1, 1], 0, 0]
    (package / "other.py").write_text("NUMBER = 1\n")  # compiles nothing
    assert run(package) == [20, [1, 1, 1], 1, 1]
    before = (package / "high.py").stat().st_mtime_ns
    (package / "low.py").write_text(LOW.replace("STEP", "2"))
    assert run(package) == [30, [2, 2, 2], 0, 0]
    assert (package / "high.py").stat().st_mtime_ns == before


@pytest.mark.slow
def test_cached_code_may_refer_to_a_class_that_no_longer_exists(package: Path) -> None:
    low = "from typing import NamedTuple\nclass Old(NamedTuple):\n    step: int\n" + LOW.replace("+ STEP", "+ Old(1).step")
    high = HIGH.replace("low(x)", "low(x) * Old(1).step").replace("import low", "import Old, low")
    keeps = "\n@jit\ndef named(old):\n    return old.step\n"
    (package / "low.py").write_text(low)
    (package / "high.py").write_text(high + keeps + "named(Old(1))\n")
    assert run(package) == [20, [1, 1, 1], 0, 0]
    for name in ("low.py", "high.py"):
        path = package / name
        path.write_text(path.read_text().replace("Old", "New"))
    assert run(package) == [20, [1, 1, 1], 0, 0]


@pytest.mark.slow
def test_two_names_of_one_package_do_not_share_a_cache(package: Path) -> None:
    """As with `pipeline` and `cropfeed` of an editable install."""
    assert run(package) == [20, [1, 1, 1], 0, 0]
    (package.parent / "alias").symlink_to(package)
    for path in package.glob("*.py"):
        path.write_text(path.read_text().replace("from pipeline.", "from ."))
    cached = set(package.glob("__pycache__/*.nbi"))
    code = RUN.replace("from pipeline.", "from alias.")
    subprocess.run([sys.executable, "-c", code], cwd=package.parent, env=clean_environment(), check=True, capture_output=True)
    assert {path.name.split(".")[0] for path in set(package.glob("__pycache__/*.nbi")) - cached} == {"alias"}
