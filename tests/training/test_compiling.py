from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from training.compiling import compiled


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))


def test_a_compiled_net_gives_the_same_and_the_trial_leaves_no_trace(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured and differentiated by torch.compile, but run by its aot_eager, which needs no minute of a C++ compiler."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, mode: compile_(module, backend="aot_eager"))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    told: list[str] = []
    fast = compiled(net, "default", [torch.zeros(5, 3, 8, 8)], nullcontext, told.append)
    assert not told
    assert fast is not net
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    images = torch.randn(5, 3, 8, 8)
    net.eval()
    torch.testing.assert_close(fast(images), net(images))


def test_one_that_cannot_be_compiled_trains_as_it_is(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: value.clone() for name, value in net.state_dict().items()}

    def broken(module: nn.Module, mode: str) -> nn.Module:
        def forward(images: torch.Tensor) -> torch.Tensor:
            module(images)  # BN has seen the trial by then
            raise RuntimeError("\n  no compiler here\nand more")

        return forward  # type: ignore[return-value]

    monkeypatch.setattr(torch, "compile", broken)
    told: list[str] = []
    assert compiled(net, "default", [torch.zeros(5, 3, 8, 8)], nullcontext, told.append) is net
    assert told == ["torch.compile does not work here (no compiler here); training goes on without it"]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
