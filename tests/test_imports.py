"""Imports run one way: train.py, tools -> training, conversion, model -> pipeline, and in it to the plan; engines never meet."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.helpers import ROOT

# Module -> what of our own it may import. A name stands for itself and everything below it.
ALLOWED: dict[str, tuple[str, ...]] = {
    "pipeline/errors.py": (),
    "pipeline/jit.py": (),
    "pipeline/draws.py": ("pipeline.jit",),
    "pipeline/plan.py": ("pipeline.draws",),
    "pipeline/geometry.py": ("pipeline.plan", "pipeline.errors"),
    "pipeline/order.py": ("pipeline.plan", "pipeline.draws"),
    "pipeline/augment.py": (),
    "pipeline/buffers.py": (),
    "pipeline/resample.py": ("pipeline.jit",),
    "pipeline/tail.py": (
        "pipeline.jit",
        "pipeline.augment",
    ),
    "pipeline/region.py": ("pipeline.jit",),
    "pipeline/storage.py": ("pipeline.errors",),
    "pipeline/prefetch.py": (),
    "pipeline/cache.py": ("pipeline.storage", "pipeline.errors"),
    "pipeline/huffman.py": ("pipeline.jit",),
    "pipeline/scan.py": (
        "pipeline.jit",
        "pipeline.huffman",
    ),
    "pipeline/transcode.py": ("pipeline.huffman", "pipeline.scan", "pipeline.region"),
    "pipeline/samples.py": ("pipeline.jit",),
    "pipeline/decode.py": ("pipeline.jit", "pipeline.huffman", "pipeline.scan", "pipeline.samples", "pipeline.region"),
    "pipeline/picture.py": ("pipeline.jit", "pipeline.decode", "pipeline.region", "pipeline.resample"),
    "pipeline/region_field.py": ("pipeline.region",),
    "pipeline/beton.py": ("pipeline.shards", "pipeline.region_field", "pipeline.storage", "pipeline.errors"),
    "pipeline/shards.py": ("pipeline.augment", "pipeline.cache", "pipeline.prefetch", "pipeline.storage", "pipeline.errors"),
    "pipeline/substitutes.py": ("pipeline.plan", "pipeline.errors"),
    "pipeline/spec.py": ("pipeline.plan", "pipeline.augment", "pipeline.geometry", "pipeline.errors"),
    "pipeline/loader.py": (
        "pipeline.plan",
        "pipeline.augment",
        "pipeline.buffers",
        "pipeline.geometry",
        "pipeline.order",
        "pipeline.picture",
        "pipeline.region",
        "pipeline.shards",
        "pipeline.spec",
        "pipeline.substitutes",
        "pipeline.tail",
        "pipeline.errors",
    ),
    "pipeline/several.py": (
        "pipeline.plan",
        "pipeline.buffers",
        "pipeline.geometry",
        "pipeline.order",
        "pipeline.picture",
        "pipeline.shards",
        "pipeline.spec",
        "pipeline.errors",
    ),
    "pipeline/engines/": (
        "pipeline.plan",
        "pipeline.augment",
        "pipeline.decode",
        "pipeline.geometry",
        "pipeline.jit",
        "pipeline.loader",
        "pipeline.picture",
        "pipeline.region",
        "pipeline.resample",
        "pipeline.shards",
        "pipeline.spec",
        "pipeline.storage",
        "pipeline.tail",
        "pipeline.errors",
    ),
    "pipeline/__init__.py": ("pipeline.loader", "pipeline.shards", "pipeline.spec", "pipeline.errors"),
    "conversion/": ("conversion", "pipeline"),
    "model/": (
        "model",
        "pipeline.plan",
        "pipeline.augment",
        "pipeline.geometry",
        "pipeline.several",
        "pipeline.storage",
        "pipeline.errors",
    ),
    "training/": ("training", "model", "pipeline"),
    "tools/": ("pipeline", "conversion", "model", "training", "tools"),
    "train.py": ("pipeline", "model", "training"),
}
OURS = ("pipeline", "conversion", "model", "training", "tools", "tests", "train")


def sources() -> list[Path]:
    return [
        path.relative_to(ROOT)
        for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("*/**/*.py")])
        if path.parts[len(ROOT.parts)] in (*OURS, "train.py")
    ]


def imported(path: Path) -> set[str]:
    """Our own modules that a file imports; `from pipeline import plan` counts as pipeline.plan."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                below = f"{node.module}.{alias.name}"
                is_module = (ROOT / (below.replace(".", "/") + ".py")).exists()
                names.add(below if is_module else node.module)
    return {name for name in names if name.split(".")[0] in OURS}


@pytest.mark.parametrize("path", [path for path in sources() if path.parts[0] != "tests"], ids=str)
def test_imports_run_one_way(path: Path) -> None:
    rules = [
        allowed
        for place, allowed in ALLOWED.items()
        if str(path) == place or (place.endswith("/") and str(path).startswith(place))
    ]
    assert len(rules) == 1, f"{path} has no place in the house, or two"
    for name in imported(path):
        assert any(name == allowed or name.startswith(allowed + ".") for allowed in rules[0]), f"{path} imports {name}"


def test_the_rule_sees_imports() -> None:
    assert "pipeline.plan" in imported(Path("pipeline/loader.py"))
    assert "pipeline.engines.dali" not in imported(Path("pipeline/__init__.py"))
