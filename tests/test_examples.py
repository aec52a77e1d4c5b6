"""The examples run as a user starts them."""

from __future__ import annotations

import re

import pytest

from tests.helpers import run_script


@pytest.mark.slow
def test_quickstart() -> None:
    """The classes differ in color, so the model learns them."""
    result = run_script("examples/quickstart.py")
    assert result.returncode == 0, result.stderr
    assert "the next batch is the same" in result.stdout
    found = re.search(r"(\d+)% of 48 validation images classified correctly", result.stdout)
    assert found, result.stdout
    assert int(found[1]) >= 95
