"""Run a script with timm: python tests/with_timm.py SCRIPT ARGUMENTS...

timm imports torchvision, which has no build for every torch. tools/install.sh installs both into a folder of their own, where no
other package finds them. Importing torchvision fails where its compiled operators cannot be loaded, as it describes them to
torch. timm's models and transforms need none of them, so here they are declared first.
"""

from __future__ import annotations

import importlib.util
import re
import runpy
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(sys.prefix) / "timm"
_declared: list[Any] = []  # operators are declared as long as their library exists


def add_timm() -> None:
    """Make timm importable. Raises ImportError if it is not installed."""
    import torch

    sys.path.append(str(FOLDER))
    found = importlib.util.find_spec("torchvision")
    if found is None or not found.submodule_search_locations:
        raise ImportError(f"torchvision is not in {FOLDER}: sh tools/install.sh installs it")
    registrations = (Path(found.submodule_search_locations[0]) / "_meta_registrations.py").read_text()
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in sorted(set(re.findall(r'"torchvision::(\w+)"|register_meta\("(\w+)"', registrations))):
        library.define(f"{''.join(name)}() -> ()")
    _declared.append(library)


if __name__ == "__main__":
    add_timm()
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
