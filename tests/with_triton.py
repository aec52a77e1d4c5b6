"""Run the fused kernel of lighting and normalization: python tests/with_triton.py FOLDER

torch for CUDA brings Triton, torch for CPUs does not. For those, tools/install.sh installs it into a folder of its own, as torch
imports it if it finds it.

FOLDER/cases.pt: a list of arguments for `normalize_on_device`. With TRITON_INTERPRET=1, writes its results, which Triton's
interpreter computes on the CPU, to FOLDER/results.pt. Without, compiles the kernel for these arguments, for GPUs of compute
capability 8.0 and 9.0, and prints the instructions that each kernel stores with. That needs no GPU.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

FOLDER = Path(sys.prefix) / "triton"


def compile_for(capability: int, cases: list[Any]) -> None:
    """Compile the kernel as `normalize_fused` does before it launches it, for another GPU than this machine's."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from pipeline.pixels import fused

    def compile_only(*arguments: Any, warmup: bool, **options: Any) -> None:
        compiled = type(kernel).run(kernel, *arguments, warmup=True, **options)
        print(capability, *re.findall(r"\bst\.global\.\S+", compiled.asm["ptx"]))

    kernel = fused._kernel
    kernel.device_caches.clear()
    kernel.run = compile_only
    target = GPUTarget("cuda", capability, 32)
    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0, get_current_stream=lambda _: 0, get_current_target=lambda: target
        )
    )  # fmt: skip
    for case in cases:
        fused.normalize_fused(*case)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.path.append(str(FOLDER))  # after the environment's own packages
    import torch

    from pipeline.pixels.normalize import normalize_on_device

    folder = Path(sys.argv[1])
    if os.environ.get("TRITON_INTERPRET") == "1":
        torch.save([normalize_on_device(*case) for case in torch.load(folder / "cases.pt")], folder / "results.pt")
    else:
        for capability in (80, 90):
            compile_for(capability, torch.load(folder / "cases.pt"))
