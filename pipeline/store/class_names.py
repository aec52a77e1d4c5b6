"""Readable names of classes.

imagenet_classes.txt has ImageNet's 1,000 classes in label order, each with the first lemma of its synset in WordNet 3.0
(Copyright 2006 by Princeton University, https://wordnet.princeton.edu). Two names stand for two classes each: crane and maillot.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path


def class_name(class_id: str, names: Mapping[str, str]) -> str:
    """The name of a class followed by its ID, "tench, n01440764"; the ID alone if the class has no other name.

    names: ID -> name, `Manifest.class_names`. Classes that it lacks get ImageNet's names.
    """
    name = names.get(class_id) or imagenet_names().get(class_id, class_id)
    return class_id if name == class_id else f"{name}, {class_id}"


@functools.cache
def imagenet_names() -> dict[str, str]:
    """wnid -> name of ImageNet's 1,000 classes."""
    lines = Path(__file__).with_name("imagenet_classes.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split(" ", 1) for line in lines)
