from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import LoaderSpec, ScaleJitter, open_loader
from tests.helpers import ROOT, clean_environment, run_script

# Prints the kernels that this process compiles while a loader opens, and then for its first batch.
COLD = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
from numba.core import event
from pipeline import LoaderSpec, ScaleJitter, open_loader
names = []
class Listener(event.Listener):
    def on_start(self, found): pass
    def on_end(self, found):
        function = found.data["dispatcher"].py_func
        if function.__module__.startswith("pipeline."):
            names.append(function.__name__)
event.register("numba:compile", Listener())
with open_loader(LoaderSpec(sys.argv[1], batch_size=8, image_size=32, geometry=ScaleJitter(36, 68), engine="cpu")) as loader:
    opening = list(names)
    next(iter(loader))
print(json.dumps([opening, names[len(opening):]]))
"""


@pytest.mark.slow
def test_a_second_process_compiles_some_of_the_kernels(image_folder: Path, tmp_path: Path) -> None:
    """The first batch compiles none of them, only what 4:1:1 images need."""
    made = run_script("tools/make_shards.py", image_folder, "--out", tmp_path / "shards")
    assert made.returncode == 0, made.stderr
    environment = {**clean_environment(), "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    result = subprocess.run(
        [sys.executable, "-c", COLD, str(tmp_path / "shards")], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert "compiling the image decoder" in result.stderr
    here, later = json.loads(result.stdout)
    assert {"decode_tiles", "decode_views"} <= set(here)
    others = {"open_tiles", "finish", "resample", "permute", "jitter", "_normalize"}
    assert not others & set(here)
    assert not (others | set(here)) & set(later)


def test_cached_kernels_need_no_second_process(small_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = LoaderSpec(small_shards, batch_size=8, image_size=32, geometry=ScaleJitter(36, 68), engine="cpu")
    with open_loader(spec) as loader:
        next(iter(loader))
    monkeypatch.setattr(subprocess, "Popen", None)
    with open_loader(spec) as loader:
        next(iter(loader))
