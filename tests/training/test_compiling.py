from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from training.compiling import compile_model


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))


def test_a_compiled_model_gives_the_same_results_and_the_trial_changes_nothing(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backend aot_eager captures and differentiates the model without a minute of C++ compilation."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, mode: compile_(module, backend="aot_eager"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    messages: list[str] = []
    compiled = compile_model(model, "default", [torch.zeros(5, 3, 8, 8)], nullcontext, messages.append)
    assert messages == []
    assert compiled is not model
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    images = torch.randn(5, 3, 8, 8)
    model.eval()
    torch.testing.assert_close(compiled(images), model(images))


def test_a_model_that_cannot_be_compiled_falls_back_to_eager_mode(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def broken(module: nn.Module, mode: str) -> nn.Module:
        def forward(images: torch.Tensor) -> torch.Tensor:
            module(images)  # so that BN has already seen the trial
            raise RuntimeError("\n  no compiler here\nand more")

        return forward  # type: ignore[return-value]

    monkeypatch.setattr(torch, "compile", broken)
    messages: list[str] = []
    assert compile_model(model, "default", [torch.zeros(5, 3, 8, 8)], nullcontext, messages.append) is model
    assert messages == ["torch.compile does not work here (no compiler here); training in eager mode"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
