"""Fields, the other members of samples: every engine that reads tars returns them in the batch's order."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from pipeline import open_loader
from pipeline.convert.make import ConvertOptions, make_shards
from pipeline.engines.multiview import MultiViewLoader, ViewSpec
from pipeline.errors import UserError
from pipeline.plan import sampling
from pipeline.plan.geometry import CentreCrop, MultiCrop
from pipeline.store.shards import ShardSet
from tests.helpers import jpeg, random_image
from tests.pipeline.contract.helpers import ids, spec_for
from tests.pipeline.contract.test_corrupt import replace_bytes

VICTIM = 7
LONG = "n" * 120  # a key that does not fit into a header


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of WebDataset tars whose samples have a .json and, some of them, a .box.txt."""
    src = tmp_path_factory.mktemp("fields") / "src"
    src.mkdir()
    for split, count in (("train", 20), ("val", 9)):
        with webdataset.TarWriter(str(src / f"{split}.tar")) as writer:
            for i in range(count):
                sample = {"__key__": f"{LONG if i == 5 else 'n'}/{i}", "jpg": jpeg(random_image(50 + i, 60, i)), "cls": i % 3}
                writer.write(sample | {"json": {"split": split, "number": i}} | ({} if i % 4 else {"box.txt": f"{i} 0 9 9"}))
    make_shards(ConvertOptions(str(src), str(src.parent / "data"), shard_size=6, workers=1))
    return src.parent / "data"


def in_stored_order(data: Path, split: str, extension: str) -> list[bytes]:
    """A field of all samples, as stock webdataset reads it."""
    tars = [str(path) for path in sorted((data / split).glob("*.tar"))]
    return [sample.get(extension, b"") for sample in webdataset.WebDataset(tars, shardshuffle=False)]


@pytest.fixture
def copy(data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(data, tmp_path / "copy"))


@pytest.mark.parametrize("threads", [1, 3])
def test_fields_come_in_the_batchs_order(data: Path, engine: str, threads: int) -> None:
    if engine == "ffcv":
        return
    spec = spec_for(data, engine, fields=("json", "box.txt"), threads=threads)
    for one, epochs in ((spec, 2), (spec.evaluation(), 1)):
        expected = {name: in_stored_order(data, one.split, name) for name in spec.fields}
        assert len(set(expected["json"])) == len(expected["json"]) > 8
        assert expected["box.txt"].count(b"") > 5
        with open_loader(one) as loader, open_loader(spec_for(data, engine) if one is spec else one) as plain:
            assert loader.fingerprint() == plain.fingerprint()
            for _ in range(epochs):
                for batch, other in zip(loader, plain, strict=True):
                    images, labels, samples = batch
                    assert batch.fields == {name: [expected[name][i] for i in samples.tolist()] for name in spec.fields}
                    assert [json.loads(text)["number"] % 3 for text in batch.fields["json"]] == labels.tolist()
                    assert torch.equal(images, other.images)


def test_a_batch_without_fields_has_none(small: Path, engine: str) -> None:
    with open_loader(spec_for(small, engine)) as loader:
        batch = next(iter(loader))
    assert batch.fields == {}
    changed = batch._replace(ids=batch.ids + 1, fields={"txt": [b"a"]})
    assert (len(changed), changed.fields, changed._replace(ids=batch.ids).fields) == (3, {"txt": [b"a"]}, {"txt": [b"a"]})


def field_range(data: Path, sample: int) -> tuple[Path, int]:
    """The tar of a training sample, and where the content of its .json begins."""
    shards = ShardSet(data, "train")
    tar = shards.shards[shards.samples["shard"][sample]]
    return tar, tar.read_bytes().index(in_stored_order(data, "train", "json")[sample])


@pytest.mark.parametrize("damage", ["image", "header", "size", "content"])
def test_a_substitute_has_its_own_fields(copy: Path, engine: str, damage: str) -> None:
    """Damaged headers of fields count only if fields are asked for, a changed bit in their content only if reads are verified."""
    if engine == "ffcv":
        return
    order = sampling.order(0, 0, np.arange(16), 20).tolist()
    assert VICTIM in order
    expected = [sampling.substitute(0, 0, VICTIM, 0, 20) if sample == VICTIM else sample for sample in order]
    fields = in_stored_order(copy, "train", "json")
    tar, start = field_range(copy, VICTIM)
    if damage == "image":
        record = ShardSet(copy, "train").samples[VICTIM]
        replace_bytes(tar, int(record["offset"]), bytes(record["bytes"]))
    else:
        at, content = {"header": (-512, bytes(512)), "size": (-512 + 124, b"00000007777"), "content": (0, b"\t")}[damage]
        replace_bytes(tar, start + at, content)
        with open_loader(spec_for(copy, engine)) as plain:
            assert ids(plain) == order
    with open_loader(spec_for(copy, engine, fields=("json",), verify=damage == "content")) as loader:
        found = [
            (sample, text) for batch in loader for sample, text in zip(batch.ids.tolist(), batch.fields["json"], strict=True)
        ]
        reason = loader.substitutes.corrupt[VICTIM]
    assert found == [(sample, fields[sample]) for sample in expected]
    assert damage == "image" or reason == (
        "its checksum is not the one in samples.npy" if damage == "content" else "its fields are damaged"
    )


def test_several_views_with_fields(data: Path) -> None:
    expected = in_stored_order(data, "val", "json")
    spec = spec_for(data, "cpu", fields=("json",), threads=2).evaluation()
    seen: list[int] = []
    for batch in MultiViewLoader(spec, [ViewSpec(CentreCrop(32), 32), ViewSpec(CentreCrop(40), 40)]):
        _, _, samples = batch
        assert batch.fields == {"json": [expected[i] for i in samples.tolist()]}
        seen += samples.tolist()
    assert sorted(seen) == list(range(9))


def test_several_views_for_training_with_fields(data: Path, engine: str) -> None:
    if engine == "ffcv":
        return
    expected = in_stored_order(data, "train", "json")
    geometry = MultiCrop(((32, 2, (0.3, 1.0)), (16, 1, (0.1, 0.3))))
    with open_loader(spec_for(data, engine, fields=("json",), geometry=geometry)) as loader:
        for batch in loader:
            assert batch.fields == {"json": [expected[i] for i in batch.ids.tolist()]}
            assert [len(images) for images in batch.images] == [16, 8]


def test_fields_that_samples_do_not_have_are_named(data: Path, small: Path, engine: str) -> None:
    if engine == "ffcv":
        with pytest.raises(UserError, match="`fields` needs shards in tars: FFCV's file has images and labels only"):
            open_loader(spec_for(small, engine, fields=("json",)))
        return
    with pytest.raises(UserError, match=r"the samples of train have no field 'txt'; they have box\.txt, json"):
        open_loader(spec_for(data, engine, fields=("json", "txt")))
    with pytest.raises(UserError, match="have no field 'json'; convert a source that has it"):
        open_loader(spec_for(small, engine, fields=("json",)))
    with pytest.raises(UserError, match=r"`fields` is a tuple of names, such as \('json',\), not 'json'"):
        open_loader(spec_for(data, engine, fields="json"))
