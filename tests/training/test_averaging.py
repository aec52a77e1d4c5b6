from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

from model import ARCHS
from training.averaging import WeightEMA
from training.compiling import compile_model
from training.optimizers import make_optimizer


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))


def perturb(model: nn.Module, seed: int, side: int = 8) -> None:
    """Change weights, BN statistics and BN counters, as a training step would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
        model.train()(torch.randn(5, 3, side, side, generator=generator))


def test_averages_follow_the_formula() -> None:
    """Parameters and running statistics follow it with warm-up, then with the decay itself. Counters are copied."""
    model = small_model()
    average = WeightEMA(model, 0.5)
    expected = {name: value.double().clone() for name, value in model.state_dict().items()}
    for step, decay in enumerate((1 / 10, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15, 7 / 16, 8 / 17, 0.5, 0.5, 0.5)):
        perturb(model, step)
        average.update(model)
        for name, value in model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value.double()
        for name, value in average.model.state_dict().items():
            if name.endswith("num_batches_tracked"):
                assert int(value) == step + 1
            else:
                torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_after_warm_up_it_equals_torchs_averaged_model() -> None:
    model = small_model()
    average = WeightEMA(model, 0.9)
    average.load_state_dict({"weights": model.state_dict(), "updates": 10**6})
    reference = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    reference.update_parameters(model)  # the first call copies
    for step in range(3):
        perturb(model, step)
        average.update(model)
        reference.update_parameters(model)
    for own, other in zip(average.model.parameters(), reference.module.parameters(), strict=True):
        assert torch.equal(own, other)
    assert not any(parameter.requires_grad for parameter in average.model.parameters())


class Operations(TorchDispatchMode):
    """The names of the operations that torch computes in this context."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("arch", ["resnet20", "resnet56"])
def test_an_update_is_two_operations_and_equals_a_loop(arch: str) -> None:
    model = ARCHS[arch](num_classes=3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = WeightEMA(model, 0.9)
    perturb(model, 0, 32)
    looped = {name: value.clone() for name, value in average.model.state_dict().items()}
    for name, value in model.state_dict().items():
        if looped[name].is_floating_point():
            looped[name].lerp_(value, 1 - 1 / 10)
        else:
            looped[name].copy_(value)
    with Operations() as seen:
        average.update(model)
    assert [name for name in seen.names if "detach" not in name] == ["aten._foreach_lerp_.Scalar", "aten._foreach_copy_.default"]
    assert all(torch.equal(value, looped[name]) for name, value in average.model.state_dict().items())
    assert int(average.model.state_dict()["bn1.num_batches_tracked"]) == 1


def test_a_restart_continues_exactly(tmp_path: Path) -> None:
    model = small_model()
    uninterrupted = WeightEMA(model, 0.99)
    for step in range(3):
        perturb(model, step)
        uninterrupted.update(model)
    torch.save(uninterrupted.state_dict(), tmp_path / "average.pt")
    restarted = WeightEMA(small_model(), 0.99)
    restarted.load_state_dict(torch.load(tmp_path / "average.pt", weights_only=True))
    for step in range(3, 6):
        perturb(model, step)
        uninterrupted.update(model)
        restarted.update(model)
    state = restarted.state_dict()
    assert state["updates"] == 6
    for name, value in uninterrupted.state_dict()["weights"].items():
        assert torch.equal(value, state["weights"][name])


def test_the_model_is_unchanged_and_the_average_has_its_keys_and_memory_format() -> None:
    model = ARCHS["resnet20"](num_classes=3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    average = WeightEMA(model, 0.9)
    other = ARCHS["resnet20"](num_classes=3)
    average.update(other)
    assert average.model.state_dict().keys() == before.keys()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert not torch.equal(average.model.state_dict()["fc.weight"], before["fc.weight"])
    assert average.model.state_dict()["layer1.0.conv1.weight"].is_contiguous(memory_format=torch.channels_last)


def test_the_average_of_a_model_prepared_by_accelerate_uses_its_own_weights() -> None:
    """In mixed precision, Accelerate patches the model's forward method. A copy must not share the patched method."""
    AcceleratorState._reset_state(True)
    try:
        model = small_model()
        prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
        average = WeightEMA(model, 0.9)
        images = torch.randn(4, 3, 8, 8)
        before = average.model.eval()(images)
        perturb(prepared, 0)
        assert torch.equal(average.model(images), before)
        assert not torch.equal(model.eval()(images), before)
    finally:
        AcceleratorState._reset_state(True)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_the_average_of_a_compiled_model_is_that_of_the_eager_one(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA graphs reuse the memory of a call's outputs, but not that of weights and statistics, which alone are averaged."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, mode: compile_(module, backend="aot_eager"))
    found = []
    for compiled in (False, True):
        model = small_model()
        average = WeightEMA(model, 0.9)
        images, messages = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)), list[str]()
        trained = compile_model(model, mode, [images], nullcontext, messages.append) if compiled else model
        optimizer = make_optimizer("sgd", model, 0.1, 0.9, 1e-4, norm_and_bias=True)
        for _ in range(3):
            trained(images).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            average.update(model)
        assert messages == []
        found.append(average.model.state_dict())
    torch.testing.assert_close(found[1], found[0])
    assert not torch.equal(found[0]["0.weight"], small_model().state_dict()["0.weight"])


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_decays_out_of_range_are_refused(decay: float) -> None:
    with pytest.raises(ValueError, match="decay must lie in"):
        WeightEMA(small_model(), decay)
