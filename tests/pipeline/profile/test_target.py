"""The loader that a user names, and one line for everything that can be wrong with it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.profile import target

MODULE = """
import os

class Loader:
    def __init__(self, count=3):
        self.count = count
    def __iter__(self):
        return iter(range(self.count))

def make_loader():
    return Loader()

def with_argument(batch_size):
    return Loader(batch_size)

def number():
    return 3

def fails():
    return os.stat("/no/such/file")

loader = Loader(5)
value = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with a package and some modules, which are forgotten at the end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "data.py").write_text(MODULE)
    (tmp_path / "needs.py").write_text("import no_such_package\n")
    (tmp_path / "wrong.py").write_text("def make(:\n")
    (tmp_path / "program.py").write_text("import sys\nsys.exit('usage')\n")
    yield tmp_path
    for name in ("mine", "mine.data", "needs", "wrong", "program"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(("name", "count"), [("make_loader", 3), ("Loader", 3), ("loader", 5)])
def test_a_function_a_class_or_an_iterable_of_the_current_folder_is_found(folder: Path, name: str, count: int) -> None:
    assert list(target.find(f"mine.data:{name}")()) == list(range(count))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mine.data", ("is not MODULE:FUNCTION", "mypackage.data:make_loader")),
        ("mine/data.py:make_loader", ("names a file", "mine.data:make_loader")),
        ("mine.date:make_loader", ("no module mine.date in {folder}",)),
        ("nowhere:make_loader", ("no module nowhere in {folder}",)),
        ("pipeline.mine:make_loader", ("Cropfeed's own package",)),
        ("mine.data:make_loaders", ("has no make_loaders", "did you mean make_loader")),
        ("mine.data:value", ("is of type int, not a function or an iterable",)),
        ("mine.data:number", ("returned an object of type int, which is not iterable",)),
        ("mine.data:with_argument", ("missing a required argument: 'batch_size'",)),
        ("needs:make", ("needs.py, line 1: ModuleNotFoundError: No module named 'no_such_package'",)),
        ("wrong:make", ("wrong.py, line 1: SyntaxError: invalid syntax;",)),
        ("program:make", ("is a program", "exit code usage")),
    ],
)
def test_a_wrong_name_or_module_is_one_line(folder: Path, name: str, words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        target.find(name)()
    assert str(caught.value).startswith(f"`loader` {name}: ")
    for word in words:
        assert word.format(folder=folder) in str(caught.value)


def test_an_exception_of_the_users_code_is_named_with_its_place(folder: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        target.find("mine.data:fails")()
    error = target.explain(caught.value, "mine.data:fails")
    line = MODULE.split("\n").index('    return os.stat("/no/such/file")') + 1
    expected = f"mine/data.py, line {line}, in fails: FileNotFoundError: [Errno 2] No such file or directory: '/no/such/file'"
    assert error.problem == f"`loader` mine.data:fails: {expected}"
    assert error.remedy == 'for the whole traceback: python -c "import mine.data as m; next(iter(m.fails()))"'


def test_the_exception_of_a_worker_process_is_taken_from_torchs_text(folder: Path) -> None:
    quoted = f"""Caught ValueError in DataLoader worker process 0.
Original Traceback (most recent call last):
  File "{sys.prefix}/lib/python3/site-packages/torch/utils/data/_utils/worker.py", line 349, in _worker_loop
    data = fetcher.fetch(index)
  File "{folder}/mine/data.py", line 12, in __getitem__
    decode(index)
  File "{sys.prefix}/lib/python3/site-packages/PIL/Image.py", line 9, in open
    raise ValueError("first")
ValueError: a bad image
"""
    error = target.explain(ValueError(quoted), "mine.data:make_loader")
    assert error.problem == "`loader` mine.data:make_loader: mine/data.py, line 12, in __getitem__: ValueError: a bad image"
