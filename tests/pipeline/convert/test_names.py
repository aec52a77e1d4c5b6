"""Class names are read from files beside the images and added to the manifest, without any other change to it."""

from __future__ import annotations

import codecs
import json
import shutil
from pathlib import Path

import pytest

from pipeline.convert.make import ConvertOptions, make_shards
from pipeline.convert.names import find_names
from pipeline.errors import UserError
from pipeline.store.shards import Manifest

FISH = ["n01440764", "n01443537", "n01484850"]


@pytest.mark.parametrize(
    ("file", "text", "names"),
    [
        ("classes.txt", "n01440764 tench\nn01443537 goldfish\n", ["tench", "goldfish"]),
        ("classes.txt", "n01484850  great white shark, white shark\r\n\r\nn09999999 other", ["", "", "great white shark"]),
        ("classes.txt", "n01443537\tgold, and red\n\n  n01440764\t Schleie \n", ["Schleie", "gold, and red"]),
        ("classes.txt", "tench\n\ngreat  fish\ntench\n", ["tench", "great fish", "tench"]),
        ("classes.txt", "n01484850\nn01443537\nn01440764\n", []),  # the folders' own names
        ("classes.txt", "n01440764\nn01443537\nn01484850\nn01491361\n", []),
        ("classes.txt", "", []),
        ("classes.json", '{"n01443537": "goldfish", "cat": "Katze"}', ["", "goldfish"]),
        ("classes.json", '["tench", "pez <dorado> & \\u00e7a", "shark"]', ["tench", "pez <dorado> & ça", "shark"]),
        ("LOC_synset_mapping.txt", "n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius\n", ["tench", "goldfish"]),
    ],
)
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_names_are_read(file: str, text: str, names: list[str], mark: bytes, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(mark + text.encode())
    assert find_names(str(tmp_path), FISH) == {one: name for one, name in zip(FISH, names, strict=False) if name}


def test_kaggles_file_lies_above_its_images(tmp_path: Path) -> None:
    src = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
    src.mkdir(parents=True)
    assert find_names(str(src), FISH) == {}
    (tmp_path / "LOC_synset_mapping.txt").write_text("n01440764 tench, Tinca tinca\n")
    assert find_names(str(src), FISH) == {"n01440764": "tench"}
    assert find_names(str(src), ["cat", "dog"]) == {}
    (src / "classes.txt").write_text("n01443537 goldfish\n")
    assert find_names(str(src), FISH) == {"n01443537": "goldfish"}


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("classes.txt", b"tench\ngoldfish\n", "has 2 names, the images have 3 classes"),
        ("classes.txt", b"n01440764 tench\n\ngoldfish\n", "line 3 is 'goldfish'"),
        ("classes.txt", b"tench\nn01443537\tgoldfish\n", "line 2 is"),
        ("classes.txt", b"tench\nSchl\xe4fer\nx\n", "line 2 is not UTF-8"),
        ("classes.txt", "tench\ngoldfish\nshark\n".encode("utf-16"), "line 1 is not UTF-8"),
        ("classes.json", b'{"n01440764": "tench",\n}', "not valid JSON.*line 2|not valid JSON.*line 1"),
        ("classes.json", b"[" * 100_000, "not valid JSON .maximum recursion depth"),
        ("classes.json", b'{"n01440764": 0}', "0 is not a name"),
        ("classes.json", b'["a", " ", "c"]', '" " is not a name'),
        ("classes.json", b'["a", "b", "c", "d"]', "has 4 names, the images have 3 classes"),
        ("classes.json", b"3", "neither an object nor a list"),
        ("LOC_synset_mapping.txt", b"n01440764 tench\ngoldfish\n", "line 2 is 'goldfish'"),
        ("LOC_synset_mapping.txt", b"tench\ngoldfish\nshark\n", "line 1 is 'tench'"),
    ],
)
def test_damaged_files_are_named(file: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        find_names(str(tmp_path), FISH)
    assert str(caught.value).startswith(f"{tmp_path / file}: ")
    assert "\n" not in str(caught.value)


def test_names_are_added_to_the_manifest_and_nothing_else_changes(image_folder: Path, tmp_path: Path) -> None:
    def convert(src: Path, name: str, **options: object) -> Path:
        make_shards(ConvertOptions(str(src), str(tmp_path / name), "original", workers=1, **options))  # type: ignore[arg-type]
        return tmp_path / name

    src = tmp_path / "images"
    shutil.copytree(image_folder, src)
    plain = convert(src, "plain")
    (src / "classes.txt").write_text("n00000000\tapple\nn00000002\tpear\nn00000009\tplum\n")
    named = convert(src, "named")
    files = [path.relative_to(plain) for path in plain.rglob("*") if path.is_file() and path.name != "manifest.json"]
    assert len(files) > 5
    assert all((plain / file).read_bytes() == (named / file).read_bytes() for file in files)
    before, after = (json.loads((out / "manifest.json").read_text()) for out in (plain, named))
    assert after == before | {"class_names": {"n00000000": "apple", "n00000002": "pear"}}
    assert Manifest(plain).class_names == {}

    again = convert(named, "again")  # shards as a source
    assert Manifest(again).class_names == {"n00000000": "apple", "n00000002": "pear"}

    (src / "classes.txt").write_text("apple\npear\n")
    with pytest.raises(UserError, match="has 2 names"):
        convert(src, "refused")
    assert not (tmp_path / "refused").exists()
