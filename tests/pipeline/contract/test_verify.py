"""Reads that are verified: a sample whose bytes have changed is replaced, or named, even if it can be decoded."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline import open_loader
from pipeline.engines.multiview import MultiViewLoader, ViewSpec
from pipeline.errors import UserError
from pipeline.plan import sampling
from pipeline.plan.geometry import CentreCrop
from pipeline.store.shards import ShardSet
from tests.pipeline.contract.helpers import ids, spec_for

VICTIM = 7


@pytest.fixture
def changed(small: Path, tmp_path: Path) -> Path:
    """A copy of the data with a changed bit in a sample of each split, between two files of the tar: decoders do not see it."""
    copy = tmp_path / "changed"
    shutil.copytree(small, copy)
    for split in ("train", "val"):
        shards = ShardSet(copy, split)
        end = int(shards.samples[VICTIM]["offset"] + shards.samples[VICTIM]["bytes"])
        with shards.shards[shards.samples[VICTIM]["shard"]].open("r+b") as stream:
            stream.seek(end)
            assert end % 512
            assert stream.read(1) == b"\0"
            stream.seek(end)
            stream.write(b"\1")
    return copy


def test_a_changed_sample_is_replaced_only_if_reads_are_verified(
    changed: Path, small: Path, engine: str, caplog: pytest.LogCaptureFixture
) -> None:
    spec = spec_for(changed, engine, verify=True)
    if engine == "ffcv":
        with pytest.raises(UserError, match="`verify` needs shards in tars"):
            open_loader(spec)
        return
    order = sampling.order(0, 0, np.arange(56), 60).tolist()
    assert VICTIM in order
    with open_loader(spec_for(changed, engine)) as plain, open_loader(spec) as verified:
        assert verified.fingerprint() == plain.fingerprint()
        assert ids(plain) == order
        expected = [sampling.substitute(0, 0, VICTIM, 0, 60) if sample == VICTIM else sample for sample in order]
        assert ids(verified) == expected
        assert verified.substitutes.corrupt == {VICTIM: "its checksum is not the one in samples.npy"}
        assert verified.replaced == 1
    with open_loader(spec_for(small, engine, verify=True)) as intact:
        assert ids(intact) == order


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_changed_sample_is_named_in_evaluation(changed: Path, engine: str, device: str) -> None:
    if engine == "ffcv":
        return
    spec = spec_for(changed, engine, verify=True, device=device).evaluation()
    message = rf"{changed}/val/.*tar: .*: cannot be decoded \(its checksum is not the one in samples.npy\)"
    with open_loader(spec) as loader, pytest.raises(UserError, match=message):
        ids(loader)
    if engine == "cpu" and device == "cpu":
        with pytest.raises(UserError, match=message):
            list(MultiViewLoader(spec, [ViewSpec(CentreCrop(32), 32), ViewSpec(CentreCrop(48), 32)]))
