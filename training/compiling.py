"""torch.compile that falls back to eager execution, and says so, where it does not work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn

MODES = ("default", "reduce-overhead", "max-autotune")  # torch.compile's; reduce-overhead: with CUDA graphs


def compiled(
    net: nn.Module, mode: str, inputs: Sequence[torch.Tensor], autocast: Callable[[], Any], tell: Callable[[str], Any]
) -> nn.Module:
    """The net compiled, after a trial forward and backward; the net itself, told of in a line, if that fails.

    torch.compile compiles at the first call, so only a call shows whether it can: it needs a C++ compiler on a CPU, and Triton on
    a GPU. mode: one of MODES. inputs: the net's, as training has them. autocast: makes the context of the forward. tell:
    prints a line. The trial leaves no trace in weights, gradients and BN's statistics.
    """
    before = [buffer.clone() for buffer in net.buffers()]
    fast = cast(nn.Module, torch.compile(net, mode=mode))
    try:
        with autocast():
            loss = fast(*inputs).float().square().mean()
        loss.backward()
    except Exception as error:  # whatever a compiler, a linker or a driver can raise
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        tell(f"torch.compile does not work here ({reason.strip()[:200]}); training goes on without it")
        fast = net
    net.zero_grad()
    for buffer, value in zip(net.buffers(), before, strict=True):
        buffer.copy_(value)
    return fast
