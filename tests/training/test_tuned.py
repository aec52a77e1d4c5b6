"""Tuned settings are used only where they are valid. A broken file never stops a run."""

from __future__ import annotations

import json
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.spec import LoaderSpec
from training import tuned
from training.tuned import load, save, with_tuned


def write_manifest(root: Path, samples: str) -> LoaderSpec:
    """Write a manifest with all entries that tuning reads. samples: their checksum."""
    shard = {"file": "0.tar", "images": 8, "bytes": 1, "sha256": "", "idx_sha256": ""}
    split = {"images": 8, "shards": [shard], "samples": "samples.npy", "samples_sha256": samples}
    statistics = {
        "channel_mean": [0] * 3, "rgb_covariance": [[0] * 3] * 3, "mean_image": "mean_image.npy", "mean_image_sha256": "",
    }  # fmt: skip
    content = {"format": "cropfeed-shards", "version": 2, "profile": "x", "classes": [], "statistics": statistics}
    root.mkdir(parents=True)
    (root / "manifest.json").write_text(json.dumps(content | {"splits": {"train": split}}))
    return LoaderSpec(root)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of the settings file, which does not exist yet. This process seems to have four cores."""
    monkeypatch.setenv("CROPFEED_TUNED", str(tmp_path / "a" / "b" / "tuned.json"))
    monkeypatch.setattr(tuned, "cores_per_process", lambda: 4)
    return tmp_path / "a" / "b" / "tuned.json"


@pytest.fixture
def spec(tmp_path: Path) -> LoaderSpec:
    return write_manifest(tmp_path / "data", "abc")


def test_saved_settings_are_found(file: Path, spec: LoaderSpec) -> None:
    assert load(spec) is None
    assert save(spec, 3, 5, 1234.56) == file
    assert load(spec) == (3, 5)
    assert load(replace(spec, threads=1, prefetch=9, batch_size=32, seed=4)) == (3, 5)
    save(spec, 2, 1, 2000)
    assert load(spec) == (2, 1)
    (entry,) = json.loads(file.read_text()).values()
    assert (entry["images_per_s"], entry["data"]) == (2000, str(spec.data))
    assert [path.name for path in file.parent.iterdir()] == ["tuned.json"]


def test_the_default_file_is_in_the_users_config_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CROPFEED_TUNED", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", "/some/config")
    assert tuned.file() == Path("/some/config/cropfeed/tuned.json")
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert tuned.file() == Path("/home/me/.config/cropfeed/tuned.json")


def test_settings_are_not_found_for_other_data_engines_devices_or_machines(
    file: Path, spec: LoaderSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(spec, 3, 5, 1.0)
    other = write_manifest(tmp_path / "other", "xyz")
    same = write_manifest(tmp_path / "copy", "abc")
    assert load(other) is None
    assert load(same) == (3, 5)  # the same data in another folder
    assert load(replace(spec, engine="cpu")) == (3, 5)  # which "auto" chooses here
    assert load(replace(spec, engine="ffcv")) is None
    save(replace(spec, engine="ffcv"), 1, 1, 1.0)
    assert load(spec) == (3, 5)  # which is still there
    for module, name, value in ((tuned, "cores_per_process", lambda: 2), (tuned.platform, "node", lambda: "another-machine")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            assert load(spec) is None
    monkeypatch.setattr(tuned.torch.cuda, "get_device_name", lambda device: "some GPU")
    assert load(replace(spec, device="cuda", engine="cpu")) is None
    save(replace(spec, device="cuda:0", engine="cpu"), 7, 7, 1.0)
    assert load(replace(spec, device="cuda", engine="cpu")) == (7, 7)
    monkeypatch.setattr(tuned.torch.cuda, "get_device_name", lambda device: "another GPU")
    assert load(replace(spec, device="cuda", engine="cpu")) is None
    assert load(spec) == (3, 5)


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"null", b"\xff\xfe\x00", b'"text"', b'{"a": '])
def test_a_broken_file_is_ignored(file: Path, spec: LoaderSpec, content: bytes) -> None:
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    assert load(spec) is None
    assert with_tuned(spec, None, None).threads == 4
    save(spec, 3, 5, 1.0)
    assert load(spec) == (3, 5)


@pytest.mark.parametrize(
    "entry", ["1", "null", '"x"', "[3, 5]", "{}", '{"threads": 3}', '{"threads": "x", "prefetch": 5}',
              '{"threads": 0, "prefetch": 5}', '{"threads": 3, "prefetch": -1}', '{"threads": Infinity, "prefetch": 5}',
              '{"threads": NaN, "prefetch": 5}', '{"threads": null, "prefetch": 5}'],
)  # fmt: skip
def test_a_broken_entry_is_ignored(file: Path, spec: LoaderSpec, entry: str) -> None:
    save(spec, 3, 5, 1.0)
    (key,) = json.loads(file.read_text())
    file.write_text(f'{{{json.dumps(key)}: {entry}, "another": {{"threads": 1}}}}')
    assert load(spec) is None
    save(spec, 3, 5, 1.0)
    assert load(spec) == (3, 5)
    assert json.loads(file.read_text())["another"] == {"threads": 1}


def test_a_file_that_cannot_be_written(file: Path, spec: LoaderSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("not a folder")
    with pytest.raises(UserError, match=r"a/b/tuned\.json: cannot be written \(.+\); name another file in CROPFEED_TUNED"):
        save(spec, 3, 5, 1.0)
    assert load(spec) is None
    folder = tmp_path / "folder"
    (folder / "tuned.json").mkdir(parents=True)
    monkeypatch.setenv("CROPFEED_TUNED", str(folder / "tuned.json"))
    with pytest.raises(UserError, match=r"folder/tuned\.json: cannot be written"):
        save(spec, 3, 5, 1.0)
    assert load(spec) is None
    assert [path.name for path in folder.iterdir()] == ["tuned.json"]  # no partial file is left


def test_explicit_settings_take_precedence(file: Path, spec: LoaderSpec) -> None:
    """They are followed by tuned settings, then by this process's share of the cores and the spec's own prefetch depth."""

    def chosen(threads: int | None, prefetch: int | None) -> tuple[int, int]:
        found = with_tuned(replace(spec, prefetch=6, threads=9), threads, prefetch)
        assert replace(found, threads=9, prefetch=6) == replace(spec, prefetch=6, threads=9)
        return found.threads, found.prefetch

    assert chosen(None, None) == (4, 6)
    assert chosen(1, None) == (1, 6)
    assert chosen(None, 1) == (4, 1)
    save(spec, 3, 5, 1.0)
    assert chosen(None, None) == (3, 5)
    assert chosen(1, None) == (1, 5)
    assert chosen(None, 1) == (3, 1)
    assert chosen(1, 2) == (1, 2)


def keep_saving(spec: LoaderSpec) -> None:
    for number in range(1, 101):
        save(spec, number, number, 1.0)
    os._exit(0)


def test_concurrent_writers_leave_no_partial_file(file: Path, spec: LoaderSpec) -> None:
    """A concurrent reader only finds complete entries."""
    save(spec, 1, 1, 1.0)
    context = multiprocessing.get_context("fork")
    engines = ("cpu", "ffcv")
    writers = [context.Process(target=keep_saving, args=(replace(spec, engine=engine),)) for engine in engines]
    for writer in writers:
        writer.start()
    reads = 0
    while any(writer.is_alive() for writer in writers) or reads == 0:
        for entry in json.loads(file.read_text()).values():
            assert entry["threads"] == entry["prefetch"] > 0
        reads += 1
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert (100, 100) in (load(replace(spec, engine=engine)) for engine in engines)
    assert [path.name for path in file.parent.iterdir()] == ["tuned.json"]
