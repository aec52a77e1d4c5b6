"""Samples that cannot be decoded: every engine replaces them in the same way, or names them in an error."""

from __future__ import annotations

import io
import logging
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import open_loader
from pipeline.errors import UserError
from pipeline.plan import sampling
from pipeline.plan.geometry import Geometry, PaddedCrop, ScaleJitter
from pipeline.store.shards import ShardSet
from tests.pipeline.contract.helpers import differences, ids, spec_for

VICTIM = 7
SECOND = sampling.substitute(0, 0, VICTIM, 0, 60)  # the first substitute in epoch 0, which is also corrupt
TRUNCATED = 31


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def damaged(small: Path, tmp_path: Path) -> Path:
    """A copy of the data with three damaged training samples: two are zeros, and one has only its first bytes."""
    copy = tmp_path / "damaged"
    shutil.copytree(small, copy)
    for sample, kept in ((VICTIM, 0), (SECOND, 0), (TRUNCATED, 60)):
        damage(copy, sample, kept)
    return copy


def damage(data: Path, sample: int, kept: int) -> None:
    """Overwrite a training sample with zeros, except for its first bytes, in its tar and in FFCV's file."""
    shards = ShardSet(data, "train")
    record = shards.samples[sample]
    overwrite(shards.shards[record["shard"]], int(record["offset"]) + kept, int(record["bytes"]) - kept)
    beton = data / "train.beton"
    if beton.exists():
        from ffcv.reader import Reader

        reader = Reader(str(beton))
        start = reader.metadata["f0"]["data_ptr"][sample]
        size = reader.alloc_table["size"][reader.alloc_table["ptr"] == start][0]
        overwrite(beton, int(start) + kept, int(size) - kept)


def overwrite(path: Path, start: int, count: int) -> None:
    replace_bytes(path, start, bytes(count))


def replace_bytes(path: Path, start: int, content: bytes) -> None:
    with path.open("r+b") as stream:
        stream.seek(start)
        stream.write(content)


def expected_ids(epoch: int, corrupt: set[int]) -> list[int]:
    """The epoch's samples, from the plan only."""
    found = []
    for sample in sampling.order(0, epoch, np.arange(56), 60).tolist():
        candidates = [sample, *(sampling.substitute(0, epoch, sample, attempt, 60) for attempt in range(32))]
        found.append(next(candidate for candidate in candidates if candidate not in corrupt))
    return found


@pytest.mark.parametrize("threads", [1, 3])
def test_corrupt_samples_are_replaced_by_the_plans_substitutes(
    damaged: Path, engine: str, device: str, threads: int, caplog: pytest.LogCaptureFixture
) -> None:
    corrupt = {VICTIM, SECOND, TRUNCATED}
    loader = open_loader(spec_for(damaged, engine, device=device, threads=threads))
    replaced = 0
    for epoch in range(3):
        expected = expected_ids(epoch, corrupt)
        assert ids(loader) == expected
        replaced += sum(a != b for a, b in zip(expected, sampling.order(0, epoch, np.arange(56), 60).tolist(), strict=True))
        assert loader.replaced == replaced > 0
    loader.close()
    assert loader.substitutes.corrupt.keys() == corrupt
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    for sample in corrupt:
        assert sum(f"{loader.locate(sample)}: cannot be decoded (" in message for message in warnings) == 1


@pytest.mark.parametrize("geometry", [ScaleJitter(36, 68), PaddedCrop(12)])
def test_a_substitute_has_its_own_draws_and_label(damaged: Path, engine: str, device: str, geometry: Geometry) -> None:
    loader = open_loader(spec_for(damaged, engine, device=device, geometry=geometry))
    for batch_range, batch in zip(loader.batch_ranges(0, 0), loader, strict=True):
        plan = loader.plan(batch_range)
        assert differences(loader, plan, batch).mean(axis=(1, 2, 3)).max() <= 1
        assert batch.labels.tolist() == loader.shards.samples["label"][batch.ids].tolist()
    loader.close()


def test_resuming_with_corrupt_samples_gives_the_same_batches(damaged: Path, engine: str, device: str) -> None:
    loader = open_loader(spec_for(damaged, engine, device=device))
    batches = list(loader)
    resumed = open_loader(spec_for(damaged, engine, device=device, threads=2))
    resumed.seek(0, 24)
    for actual, reference in zip(resumed, batches[3:], strict=True):
        assert np.array_equal(actual.ids, reference.ids)
        assert torch.equal(actual.images, reference.images)
    loader.close()
    resumed.close()


@pytest.mark.parametrize("threads", [1, 3])
def test_the_policy_stop_names_the_sample(damaged: Path, engine: str, device: str, threads: int) -> None:
    loader = open_loader(spec_for(damaged, engine, device=device, corrupt="stop", threads=threads))
    names = "|".join(re.escape(loader.locate(sample)) for sample in (VICTIM, SECOND, TRUNCATED))
    with pytest.raises(UserError, match=rf"({names}): cannot be decoded \(.+\); make the shards again") as caught:
        ids(loader)
    assert "\n" not in str(caught.value)
    loader.close()


def test_an_image_whose_header_has_another_size_is_replaced(small: Path, engine: str, device: str, tmp_path: Path) -> None:
    """The table of segments still fits: the height changes by less than a row of MCUs. Crops would be of other pixels."""
    copy = tmp_path / "copy"
    shutil.copytree(small, copy)
    shards = ShardSet(copy, "train")
    sample = int(np.flatnonzero(shards.samples["height"] % 16 > 8)[0])
    record, stored = shards.samples[sample], shards.read(sample).tobytes()
    height = int(record["height"])
    frame = stored.index(b"\xff\xc0")
    change = stored[: frame + 5] + (height - 2).to_bytes(2, "big") + stored[frame + 7 :]
    replace_bytes(shards.shards[record["shard"]], int(record["offset"]), change)
    if engine == "ffcv":
        content = (copy / "train.beton").read_bytes()
        replace_bytes(copy / "train.beton", content.index(stored), change)
    loader = open_loader(spec_for(copy, engine, device=device))
    assert ids(loader) == expected_ids(0, {sample})
    assert loader.substitutes.corrupt.keys() == {sample}
    loader.close()


def test_a_jpeg_of_too_many_scans_is_replaced(small: Path, engine: str, device: str, tmp_path: Path) -> None:
    """It could take minutes. The converter leaves it out, but shards can be changed."""
    copy = tmp_path / "copy"
    shutil.copytree(small, copy)
    shards = ShardSet(copy, "train")
    sample = int(shards.samples["bytes"].argmax())
    record, stored, stream = shards.samples[sample], shards.read(sample).tobytes(), io.BytesIO()
    Image.new("L", (int(record["width"]), int(record["height"]))).save(stream, "JPEG", progressive=True)
    whole = stream.getvalue()
    change = whole[:-2] + 101 * whole[whole.rindex(b"\xff\xda") : -2] + whole[-2:]
    assert len(change) <= len(stored)
    replace_bytes(shards.shards[record["shard"]], int(record["offset"]), change)
    if engine == "ffcv":
        replace_bytes(copy / "train.beton", (copy / "train.beton").read_bytes().index(stored), change)
    loader = open_loader(spec_for(copy, engine, device=device))
    assert ids(loader) == expected_ids(0, {sample})
    assert "more than 100 scans" in loader.substitutes.corrupt[sample]
    loader.close()


def test_data_without_any_decodable_sample_is_refused(small: Path, engine: str, device: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(small, copy)
    for sample in range(60):
        damage(copy, sample, 0)
    loader = open_loader(spec_for(copy, engine, device=device))
    with pytest.raises(UserError, match="nor its substitutes can be decoded"):
        ids(loader)
    loader.close()


def test_a_truncated_file_is_named(small: Path, engine: str, device: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(small, copy)
    file, words = ("train.beton", "is damaged") if engine == "ffcv" else ("train/000002.tar", "has 9000 bytes")
    (copy / file).write_bytes((copy / file).read_bytes()[:9000])
    with pytest.raises(UserError, match=f"{copy / file}: {words}"):
        ids(open_loader(spec_for(copy, engine, device=device)))
