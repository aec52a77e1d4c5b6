"""Numbers in samples.npy that index something must be in range, even if the file's hash is that in manifest.json."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import UserError
from pipeline.store import checks, shards
from pipeline.store.checks import samples_problem
from pipeline.store.shards import ShardSet
from pipeline.store.tar import SAMPLE

SHARDS = np.array([3, 5]), np.array([5000, 9000])
NONE = np.array([], np.int64), np.array([], np.int64)


def records() -> Any:
    found = np.zeros(5, SAMPLE)
    found["shard"] = [0, 0, 0, 1, 1]
    found["offset"], found["bytes"] = [1024, 2048, 3072, 1024, 8000], 1000
    found["height"], found["width"], found["label"] = 1, 2, [0, 1, 2, 0, 2]
    return found


def test_correct_records_have_no_problem() -> None:
    assert samples_problem(records(), 3, *SHARDS) == ""
    assert samples_problem(records()[3:], 3, *SHARDS, first=3) == ""
    assert samples_problem(records(), 3, *NONE) == ""  # a data set of FFCV files


@pytest.mark.parametrize("at_once", [1, 2, 1 << 20])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("label", 3), ("label", -1), ("label", -(2**31)), ("shard", 0), ("shard", 2), ("shard", 2**32 - 1), ("height", 0),
        ("width", 0), ("bytes", 0), ("bytes", 7977), ("bytes", 2**32 - 1), ("offset", 9001), ("offset", 2**64 - 1),
        ("offset", 2**63),
    ],
)  # fmt: skip
def test_a_number_out_of_range_is_named(field: str, value: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_AT_ONCE", at_once)
    samples = records()
    samples[field][3] = value
    expected = f"the {field} of sample 3 is out of range ({value})"
    assert samples_problem(samples, 3, *SHARDS) == expected
    assert samples_problem(samples[3:4], 3, *SHARDS, first=3) == expected


def with_label(source: Path, out: Path, sample: int, label: int) -> Path:
    """A copy of a data set with another label, and with the hash of the changed file."""
    shutil.copytree(source, out)
    path = out / "train" / "samples.npy"
    samples = np.load(path)
    samples["label"][sample] = label
    np.save(path, samples)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["splits"]["train"]["samples_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (out / "manifest.json").write_text(json.dumps(manifest))
    return out


@pytest.mark.parametrize("cached", [False, True])
def test_a_label_out_of_range_is_refused_when_the_data_is_opened(small_shards: Path, tmp_path: Path, cached: bool) -> None:
    data = with_label(small_shards, tmp_path / "data", 7, 3)
    with pytest.raises(UserError, match=rf"{data}/train/samples.npy: the label of sample 7 is out of range \(3\)"):
        ShardSet(data, "train", tmp_path / "cache" if cached else None)


def test_while_a_long_check_runs_each_record_is_checked_when_it_is_read(
    small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = threading.Event()
    monkeypatch.setattr(shards, "_CHECKED_AT_ONCE", 0)
    monkeypatch.setattr(shards, "hash_problem", lambda path, sha256: "" if finish.wait(20) else "not finished")
    stored = ShardSet(with_label(small_shards, tmp_path / "data", 7, 3), "train")
    assert len(stored.read(6)) > 0
    with pytest.raises(UserError, match="the label of sample 7 is out of range"):
        stored.read(7)
    finish.set()
    with pytest.raises(UserError, match="the label of sample 7 is out of range"):
        stored._check.wait()
    with pytest.raises(UserError, match="the label of sample 7 is out of range"):
        stored.read(6)
