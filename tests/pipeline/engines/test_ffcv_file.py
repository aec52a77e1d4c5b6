"""Damaged .beton files: an error that names the file, replaced images, or the same batches, never a crash or other labels."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT, clean_environment, run_script
from tests.pipeline.contract.conftest import WITHOUT

# Prints how often damage to numbers had each outcome. Where the numbers are follows from FFCV's header types.
MUTANTS = """
import collections, json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import numpy as np
import torch
from ffcv.reader import Reader
from ffcv.types import FieldDescType, HeaderType
from pipeline import LoaderSpec, ScaleJitter, open_loader
from pipeline.errors import UserError

data, count = Path(sys.argv[2]), int(sys.argv[3])
path = data / "train.beton"
spec = LoaderSpec(data, batch_size=12, image_size=32, geometry=ScaleJitter(36, 68), threads=2, engine="ffcv")


def epoch():
    with open_loader(spec) as loader:
        batches = [(batch.images.clone(), batch.labels.clone()) for batch in loader]
        return batches, bool(loader.substitutes.corrupt)


expected, _ = epoch()
original = path.read_bytes()
reader = Reader(str(path))
fields = HeaderType.itemsize + len(reader.field_descriptors) * FieldDescType.itemsize
records = fields + reader.metadata.nbytes
table = int(reader.header["alloc_table_ptr"])
zones = [(0, HeaderType.itemsize), (HeaderType.itemsize, fields), (fields, records), (table, len(original))]
values = [0, 1, 255, 1 << 15, 65535, 1 << 31, 1 << 33, 1 << 40, 1 << 63, (1 << 64) - 1, len(original), table]
rng = np.random.default_rng(0)
found = collections.Counter()
for trial in range(count):
    low, high = zones[int(rng.choice(4, p=[0.15, 0.05, 0.45, 0.35]))]
    at = int(rng.integers(low, high))
    damage = bytes([original[at] ^ 1 << int(rng.integers(8))])
    if trial % 3 == 0:
        at = low + (at - low) // 8 * 8
        damage = int(values[rng.integers(len(values))]).to_bytes(8, "little")[: high - at]
    mutant = original[:at] + damage + original[at + len(damage) :]
    path.write_bytes(mutant[: trial * 997 % len(mutant)] if trial % 50 == 49 else mutant)
    try:
        batches, replaced = epoch()
    except UserError as error:
        assert str(path) in str(error) and "\\n" not in str(error), str(error)
        found["refused"] += 1
        continue
    same = all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(batches, expected, strict=True))
    found["replaced" if replaced else "same" if same else "other"] += 1
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif("ffcv" in WITHOUT, reason="engine ffcv is in CROPFEED_WITHOUT")
def test_damaged_numbers_are_refused_or_without_effect(image_folder: Path, tmp_path: Path) -> None:
    made = run_script("tools/make_shards.py", image_folder, "--out", tmp_path / "data", "--format", "both")
    assert made.returncode == 0, made.stderr
    command = [sys.executable, "-c", MUTANTS, str(ROOT), str(tmp_path / "data"), "400"]
    result = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-2000:]  # a negative code is a crash
    found = json.loads(result.stdout)
    assert found.get("other", 0) == 0
    assert found["refused"] > 200
    assert found["same"] > 0
