from __future__ import annotations

import re

from pipeline.store.class_names import class_name, imagenet_names


def test_the_table_has_imagenets_classes_in_label_order() -> None:
    names = imagenet_names()
    assert len(names) == 1000
    assert list(names) == sorted(names)
    assert all(re.fullmatch(r"n\d{8}", wnid) for wnid in names)
    assert all(name == name.strip() and "," not in name for name in names.values())
    labels = list(names.values())
    assert [labels[label] for label in (0, 1, 207, 281, 999)] == [
        "tench", "goldfish", "golden retriever", "tabby", "toilet tissue",
    ]  # fmt: skip
    assert [label for label, name in enumerate(labels) if name == "crane"] == [134, 517]
    assert [label for label, name in enumerate(labels) if name == "maillot"] == [638, 639]
    assert len(set(labels)) == 998


def test_names_are_shown_with_their_class() -> None:
    assert class_name("n01440764", {}) == "tench, n01440764"
    assert (class_name("n02012849", {}), class_name("n03126707", {})) == ("crane, n02012849", "crane, n03126707")
    assert class_name("n01440764", {"n01440764": "Schleie"}) == "Schleie, n01440764"
    assert class_name("n01443537", {"n01440764": "Schleie"}) == "goldfish, n01443537"
    assert class_name("07", {"07": "bus"}) == "bus, 07"
    assert class_name("bus", {"bus": "bus"}) == "bus"
    assert class_name("n00000000", {}) == "n00000000"
