from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from model import ARCHS
from pipeline.errors import UserError
from training.optimizers import LARS, OPTIMIZERS, load_state, make_optimizer, parameter_groups, scaled_rate


def small_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))


def fill_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, rates: Sequence[float]) -> Iterator[float]:
    """Take a step with new gradients at each rate, and yield the rate afterwards."""
    for step, rate in enumerate(rates):
        fill_gradients(model, step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        yield rate


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "resnet20"])
def test_norm_parameters_and_biases_decay_only_with_norm_and_bias(arch: str) -> None:
    with torch.device("meta"):
        model = ARCHS[arch]()
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, spared = parameter_groups(model, 5e-5, norm_and_bias=False)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (5e-5, 0.0)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    assert [names[parameter] for parameter in decayed["params"]] == [f"{name}.weight" for name in layers]
    others = [name for name in names.values() if name.removesuffix(".weight") not in layers]
    assert [names[parameter] for parameter in spared["params"]] == others
    assert any(".bn" in name and name.endswith(".bias") for name in others)
    assert "fc.bias" in others
    (everything,) = parameter_groups(model, 1e-4, norm_and_bias=True)
    assert everything["weight_decay"] == 1e-4
    assert [names[parameter] for parameter in everything["params"]] == list(names.values())


def test_sgd_is_fused_on_a_gpu() -> None:
    with FakeTensorMode():
        for device, fused in (("cuda", True), ("meta", False)):
            parameters = nn.ParameterList([torch.empty(2, 3, device=device)])
            (group,) = make_optimizer("sgd", parameters, 0.1, 0.9, 1e-4, norm_and_bias=True).param_groups
            assert (group["fused"], group["foreach"]) == (fused, not fused)


@pytest.mark.parametrize("norm_and_bias", [False, True])
def test_sgd_follows_the_formula_of_momentum_and_decay(norm_and_bias: bool) -> None:
    model = small_model()
    optimizer = make_optimizer("sgd", model, 0.1, 0.9, 0.01, norm_and_bias)
    assert all(group["fused"] for group in optimizer.param_groups)
    expected = [parameter.detach().double().numpy().copy() for parameter in model.parameters()]
    momenta = [np.zeros_like(array) for array in expected]
    for rate in steps(model, optimizer, (0.1, 0.1, 0.02, 0.3)):
        for index, parameter in enumerate(model.parameters()):
            assert parameter.grad is not None
            decay = 0.01 if norm_and_bias or parameter.ndim > 1 else 0.0
            momenta[index] = 0.9 * momenta[index] + parameter.grad.double().numpy() + decay * expected[index]
            expected[index] -= rate * momenta[index]
            np.testing.assert_allclose(parameter.detach().numpy(), expected[index], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm_and_bias", [False, True])
def test_lars_follows_algorithm_1(norm_and_bias: bool) -> None:
    """Algorithm 1 of You et al. 2017, written out for each tensor, with a weight decay that is strong enough to matter."""
    model = small_model()
    optimizer = make_optimizer("lars", model, 1.0, 0.9, 0.5, norm_and_bias)
    weights = [parameter.detach().double().numpy().copy() for parameter in model.parameters()]
    velocities = [np.zeros_like(array) for array in weights]
    for rate in steps(model, optimizer, (10.0, 10.0, 2.0, 30.0, 0.5)):
        for index, parameter in enumerate(model.parameters()):
            assert parameter.grad is not None
            gradient, weight = parameter.grad.double().numpy(), weights[index]
            beta = 0.5 if norm_and_bias or weight.ndim > 1 else 0.0
            local = 1.0
            if weight.ndim > 1:
                length = np.sqrt((weight**2).sum())
                local = 0.001 * length / (np.sqrt((gradient**2).sum()) + beta * length)
            velocities[index] = 0.9 * velocities[index] + rate * local * (gradient + beta * weight)
            weights[index] = weight - velocities[index]
            np.testing.assert_allclose(
                parameter.detach().numpy(), weights[index], rtol=2e-5, atol=1e-5 * abs(weights[index]).max()
            )


def test_lars_handles_zero_weights_and_zero_gradients() -> None:
    zero, still, unused = (nn.Parameter(tensor) for tensor in (torch.zeros(2, 2), torch.ones(2, 2), torch.ones(2, 2)))
    zero.grad, still.grad = torch.ones(2, 2), torch.zeros(2, 2)
    LARS([zero, still, unused], 0.5).step()
    assert torch.equal(zero.detach(), torch.full((2, 2), -0.5))
    assert torch.equal(still.detach(), torch.ones(2, 2))
    assert torch.equal(unused.detach(), torch.ones(2, 2))
    with pytest.raises(ValueError, match="trust 0"):
        LARS([zero], 0.1, trust=0.0)
    assert LARS([zero], 0.5).step(lambda: 7) == 7


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restart_changes_nothing(name: str) -> None:
    uninterrupted, first = small_model(), small_model()
    optimizers = [make_optimizer(name, model, 0.3, 0.9, 0.01, False) for model in (uninterrupted, first)]
    for step in range(3):
        for model, optimizer in zip((uninterrupted, first), optimizers, strict=True):
            fill_gradients(model, step)
            optimizer.step()
    second = small_model(1)
    second.load_state_dict(first.state_dict())
    restarted = make_optimizer(name, second, 0.3, 0.9, 0.01, False)
    load_state(restarted, optimizers[1].state_dict())
    for step in range(3, 5):
        for model, optimizer in ((uninterrupted, optimizers[0]), (second, restarted)):
            fill_gradients(model, step)
            optimizer.step()
    for expected, found in zip(uninterrupted.parameters(), second.parameters(), strict=True):
        assert torch.equal(expected, found)


def test_only_momentum_is_loaded_from_a_checkpoint() -> None:
    """A checkpoint of SGD that was not fused, as in older versions, continues with fused SGD and the new options."""
    model = small_model()
    plain = torch.optim.SGD(model.parameters(), 0.7, 0.5, weight_decay=0.1)
    fill_gradients(model, 0)
    plain.step()
    optimizer = make_optimizer("sgd", model, 0.1, 0.9, 0.01, True)
    load_state(optimizer, plain.state_dict())
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"], group["fused"]) == (0.1, 0.9, 0.01, True)
    for parameter in model.parameters():
        assert torch.equal(optimizer.state[parameter]["momentum_buffer"], plain.state[parameter]["momentum_buffer"])


def test_a_checkpoint_of_another_optimizer_is_refused() -> None:
    model = small_model()
    made = {(name, both): make_optimizer(name, model, 0.1, 0.9, 0.0, both) for name in OPTIMIZERS for both in (False, True)}
    for one, optimizer in made.items():
        for other, saved in made.items():
            if one != other:
                with pytest.raises(UserError, match="resume with the same"):
                    load_state(optimizer, saved.state_dict())
    with pytest.raises(UserError, match="another model"):
        load_state(made["sgd", True], make_optimizer("sgd", nn.Linear(2, 2), 0.1, 0.9, 0.0, True).state_dict())
    with pytest.raises(ValueError, match="'adam'; choose from sgd, lars"):
        make_optimizer("adam", model, 0.1, 0.9, 0.0, True)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_all_optimizers_train_under_accelerate(name: str) -> None:
    accelerator = Accelerator(cpu=True)
    model = small_model()
    prepared, optimizer = accelerator.prepare(
        model, make_optimizer(name, model, 0.05 if name == "sgd" else 5.0, 0.9, 1e-4, False)
    )
    images, labels = torch.randn(10, 3, 8, 8), torch.arange(10) % 5
    losses = []
    for _ in range(60):
        loss = F.cross_entropy(prepared(images), labels)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_scaled_for_float16_give_the_same_step(name: str) -> None:
    plain, scaled = small_model(), small_model()
    scaler: Any = torch.amp.GradScaler("cpu", init_scale=1024.0)
    images, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    for model, is_scaled in ((plain, False), (scaled, True)):
        optimizer = make_optimizer(name, model, 0.1, 0.9, 0.01, False)
        loss = F.cross_entropy(model(images), labels)
        if is_scaled:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        else:
            loss.backward()
            optimizer.step()
    for expected, found in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(found, expected)
    before = [parameter.detach().clone() for parameter in scaled.parameters()]
    scaler.scale(F.cross_entropy(scaled(images * float("nan")), labels)).backward()
    scaler.step(optimizer)  # skipped
    assert all(torch.equal(old, parameter.detach()) for old, parameter in zip(before, scaled.parameters(), strict=True))


def test_only_a_fused_optimizer_lets_a_scaler_leave_out_steps_on_the_device() -> None:
    """torch.amp.GradScaler waits for the device before each step of an optimizer without this attribute."""
    for name, fused in (("sgd", True), ("lars", False)):
        optimizer = make_optimizer(name, small_model(), 1.0, 0.9, 0.1, norm_and_bias=True)
        assert hasattr(optimizer, "_step_supports_amp_scaling") == fused


def test_rates_are_proportional_to_the_batch_size() -> None:
    """Goyal et al. 2017: 0.1 for 256 images, 3.2 for 8192."""
    assert [scaled_rate(0.1, batch) for batch in (256, 8192, 64)] == pytest.approx([0.1, 3.2, 0.025])
