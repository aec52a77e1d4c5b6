"""torch.compile with a fallback: if compiling fails, the model trains in eager mode, and a message says why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn

from pipeline.progress import announce_if_slow

GRAPHED = ("reduce-overhead", "max-autotune")  # modes with CUDA graphs, whose outputs each call overwrites
MODES = ("default", *GRAPHED)  # of torch.compile


def compile_model(
    model: nn.Module, mode: str, inputs: Sequence[torch.Tensor], autocast: Callable[[], Any], report: Callable[[str], Any]
) -> nn.Module:
    """The compiled model, after a trial forward and backward pass. If these fail, reports why and returns the model itself.

    torch.compile compiles at the first call, so only a call shows whether it works: it needs a C++ compiler on a CPU, and Triton
    on a GPU. The trial leaves weights, gradients and BN statistics unchanged.

    mode: one of MODES. inputs: arguments of the forward pass, as in training. autocast: returns the context manager of the
    forward pass. report: prints a line.
    """
    before = [buffer.clone() for buffer in model.buffers()]
    compiled = cast(nn.Module, torch.compile(model, mode=mode))
    try:
        with announce_if_slow(f"compiling the model (torch.compile, {mode}), which takes one to ten minutes"):
            with autocast():
                loss = compiled(*inputs).float().square().mean()
            loss.backward()
    except Exception as error:  # compilers, linkers and drivers raise all kinds
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        report(f"torch.compile does not work here ({reason.strip()[:200]}); training in eager mode")
        compiled = model
    model.zero_grad()
    for buffer, value in zip(model.buffers(), before, strict=True):
        buffer.copy_(value)
    return compiled
