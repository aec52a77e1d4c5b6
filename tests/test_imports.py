"""Imports run one way: the library does not need the application, and neither needs the laboratory."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tests.helpers import ROOT

OURS = ("pipeline", "model", "training", "tools", "tests", "train")
# Path -> the paths from which its files may import. The first rule for a file counts. A path may always import from itself.
RULES: dict[str, tuple[str, ...]] = {
    "pipeline/jit.py": (),
    "pipeline/errors.py": (),
    "pipeline/progress.py": (),
    "pipeline/plan/": ("pipeline/jit.py", "pipeline/errors.py"),
    "pipeline/jpeg/": ("pipeline/jit.py", "pipeline/errors.py"),
    "pipeline/pixels/": ("pipeline/jpeg/", "pipeline/jit.py", "pipeline/errors.py"),
    "pipeline/store/": ("pipeline/pixels/normalize.py", "pipeline/jit.py", "pipeline/progress.py", "pipeline/errors.py"),
    "pipeline/": ("pipeline/",),
    "model/": ("pipeline/",),
    "training/": ("model/", "pipeline/"),
    "train.py": ("training/", "model/", "pipeline/"),
    "tools/bench/": ("tools/", "training/", "model/", "pipeline/"),
    "tools/paper/": ("tools/", "training/", "model/", "pipeline/"),
    "tools/": ("training/", "model/", "pipeline/"),
}
LABORATORY = ("tools/bench/", "tools/paper/")


def sources() -> list[Path]:
    files = sorted([*ROOT.glob("*.py"), *ROOT.glob("*/**/*.py")])
    relative = [path.relative_to(ROOT) for path in files]
    return [path for path in relative if path.parts[0] in (*OURS, "train.py") and path.parts[0] != "tests"]


def imported(path: Path) -> set[str]:
    """The files of this repository that a file imports, as paths from the root."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.replace(".", "/") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "/".join(path.parts[: len(path.parts) - node.level]) if node.level else ""
            module = "/".join(filter(None, (base, (node.module or "").replace(".", "/"))))
            found |= {f"{module}/{alias.name}" for alias in node.names}
    files = set()
    for name in found:
        for place in (name, name.rpartition("/")[0]):  # a module, or a name in one
            if place and (ROOT / f"{place}.py").is_file():
                files.add(f"{place}.py")
                break
            if place and (ROOT / place / "__init__.py").is_file():
                files.add(f"{place}/__init__.py")
                break
    return {file for file in files if file.split("/")[0] in (*OURS, "train.py")}


@pytest.mark.parametrize("path", sources(), ids=str)
def test_imports_run_one_way(path: Path) -> None:
    place, allowed = next((place, allowed) for place, allowed in RULES.items() if str(path).startswith(place))
    for file in imported(path):
        assert file.startswith((place, *allowed)), f"{path} imports {file}"
        assert place in LABORATORY or not file.startswith(LABORATORY), f"{path} imports {file}, which is the laboratory's"


@pytest.mark.parametrize("path", [path for path in sources() if path.parts[0] == "pipeline"], ids=str)
def test_the_library_imports_itself_relatively(path: Path) -> None:
    """The installed library has another name than its folder in a checkout."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.ImportFrom) and not node.level:
            assert node.module is not None
            assert node.module.split(".")[0] not in (*OURS, "cropfeed")


def test_imports_are_found() -> None:
    assert "pipeline/plan/sampling.py" in imported(Path("pipeline/loader.py"))
    assert "pipeline/plan/random.py" in imported(Path("pipeline/plan/order.py"))
    assert "pipeline/engines/dali.py" not in imported(Path("pipeline/__init__.py"))


def test_importing_the_library_needs_no_other_package() -> None:
    code = (
        "import sys, pipeline; dir(pipeline); print(sorted({m.split('.')[0] for m in sys.modules} & {'numpy', 'torch', 'numba'}))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


@pytest.mark.parametrize("folder", ["", "tools", "tools/bench", "tools/paper"])
def test_no_script_hides_another_module(folder: str) -> None:
    """A script's folder comes first in sys.path. `profiling` is a standard module since Python 3.15 (PEP 799)."""
    names = {path.stem for path in (ROOT / folder).iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert not names & (sys.stdlib_module_names | {"profiling"})
    assert not names & set(metadata.packages_distributions()) - {"tools"} - set(OURS)


@pytest.mark.parametrize("path", sources(), ids=str)
def test_no_private_name_is_used_outside_its_module(path: Path) -> None:
    tree = ast.parse((ROOT / path).read_text())
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    internal = [alias for node in froms if node.level or (node.module or "").split(".")[0] in OURS for alias in node.names]
    assert not [alias.name for alias in internal if alias.name.startswith("_")]
    names = {alias.asname or alias.name for alias in internal}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names:
            assert not node.attr.startswith("_") or node.attr.startswith("__"), f"{node.value.id}.{node.attr}"
