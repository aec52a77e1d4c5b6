from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from model import ARCHS
from pipeline.errors import UserError
from training.optimizers import LARS, OPTIMIZERS, load_state, make_optimizer, parameter_groups, scaled_rate


def small_net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))


def fill_gradients(net: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def steps(net: nn.Module, optimizer: torch.optim.Optimizer, rates: Sequence[float]) -> Iterator[float]:
    """A step with other gradients at each rate, which is yielded after it."""
    for step, rate in enumerate(rates):
        fill_gradients(net, step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        yield rate


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "resnet20"])
def test_scales_shifts_and_biases_do_not_decay_unless_asked_to(arch: str) -> None:
    with torch.device("meta"):
        net = ARCHS[arch]()
    names = {parameter: name for name, parameter in net.named_parameters()}
    decayed, spared = parameter_groups(net, 5e-5, norm_and_bias=False)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (5e-5, 0.0)
    layers = {name: module for name, module in net.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    assert [names[parameter] for parameter in decayed["params"]] == [f"{name}.weight" for name in layers]
    others = [name for name in names.values() if name.removesuffix(".weight") not in layers]
    assert [names[parameter] for parameter in spared["params"]] == others
    assert any(".bn" in name and name.endswith(".bias") for name in others)
    assert "fc.bias" in others
    (everything,) = parameter_groups(net, 1e-4, norm_and_bias=True)
    assert everything["weight_decay"] == 1e-4
    assert [names[parameter] for parameter in everything["params"]] == list(names.values())


@pytest.mark.parametrize("norm_and_bias", [False, True])
def test_sgd_is_the_formula_of_momentum_and_decay(norm_and_bias: bool) -> None:
    net = small_net()
    optimizer = make_optimizer("sgd", net, 0.1, 0.9, 0.01, norm_and_bias)
    assert all(group["fused"] for group in optimizer.param_groups)
    expected = [parameter.detach().double().numpy().copy() for parameter in net.parameters()]
    momenta = [np.zeros_like(array) for array in expected]
    for rate in steps(net, optimizer, (0.1, 0.1, 0.02, 0.3)):
        for place, parameter in enumerate(net.parameters()):
            assert parameter.grad is not None
            decay = 0.01 if norm_and_bias or parameter.ndim > 1 else 0.0
            momenta[place] = 0.9 * momenta[place] + parameter.grad.double().numpy() + decay * expected[place]
            expected[place] -= rate * momenta[place]
            np.testing.assert_allclose(parameter.detach().numpy(), expected[place], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm_and_bias", [False, True])
def test_lars_is_algorithm_1(norm_and_bias: bool) -> None:
    """You et al. 2017, written out for each tensor; the decay strong enough to count."""
    net = small_net()
    optimizer = make_optimizer("lars", net, 1.0, 0.9, 0.5, norm_and_bias)
    weights = [parameter.detach().double().numpy().copy() for parameter in net.parameters()]
    velocities = [np.zeros_like(array) for array in weights]
    for rate in steps(net, optimizer, (10.0, 10.0, 2.0, 30.0, 0.5)):
        for place, parameter in enumerate(net.parameters()):
            assert parameter.grad is not None
            gradient, weight = parameter.grad.double().numpy(), weights[place]
            beta = 0.5 if norm_and_bias or weight.ndim > 1 else 0.0
            local = 1.0
            if weight.ndim > 1:
                length = np.sqrt((weight**2).sum())
                local = 0.001 * length / (np.sqrt((gradient**2).sum()) + beta * length)
            velocities[place] = 0.9 * velocities[place] + rate * local * (gradient + beta * weight)
            weights[place] = weight - velocities[place]
            np.testing.assert_allclose(
                parameter.detach().numpy(), weights[place], rtol=2e-5, atol=1e-5 * abs(weights[place]).max()
            )


def test_lars_moves_weights_of_zero_and_bears_gradients_of_zero() -> None:
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
def test_a_restart_goes_on_as_if_there_had_been_none(name: str) -> None:
    whole, first = small_net(), small_net()
    optimizers = [make_optimizer(name, net, 0.3, 0.9, 0.01, False) for net in (whole, first)]
    for step in range(3):
        for net, optimizer in zip((whole, first), optimizers, strict=True):
            fill_gradients(net, step)
            optimizer.step()
    second = small_net(1)
    second.load_state_dict(first.state_dict())
    restarted = make_optimizer(name, second, 0.3, 0.9, 0.01, False)
    load_state(restarted, optimizers[1].state_dict())
    for step in range(3, 5):
        for net, optimizer in ((whole, optimizers[0]), (second, restarted)):
            fill_gradients(net, step)
            optimizer.step()
    for ours, theirs in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_checkpoint_gives_momentum_and_no_options() -> None:
    """One of SGD that was not fused, as those of before, goes on fused and at the new rates."""
    net = small_net()
    plain = torch.optim.SGD(net.parameters(), 0.7, 0.5, weight_decay=0.1)
    fill_gradients(net, 0)
    plain.step()
    optimizer = make_optimizer("sgd", net, 0.1, 0.9, 0.01, True)
    load_state(optimizer, plain.state_dict())
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"], group["fused"]) == (0.1, 0.9, 0.01, True)
    for parameter in net.parameters():
        assert torch.equal(optimizer.state[parameter]["momentum_buffer"], plain.state[parameter]["momentum_buffer"])


def test_a_checkpoint_of_another_optimizer_is_refused() -> None:
    net = small_net()
    made = {(name, both): make_optimizer(name, net, 0.1, 0.9, 0.0, both) for name in OPTIMIZERS for both in (False, True)}
    for one, optimizer in made.items():
        for other, saved in made.items():
            if one != other:
                with pytest.raises(UserError, match="resume with the same"):
                    load_state(optimizer, saved.state_dict())
    with pytest.raises(UserError, match="another net"):
        load_state(made["sgd", True], make_optimizer("sgd", nn.Linear(2, 2), 0.1, 0.9, 0.0, True).state_dict())
    with pytest.raises(ValueError, match="'adam'; choose from sgd, lars"):
        make_optimizer("adam", net, 0.1, 0.9, 0.0, True)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_both_train_under_accelerate(name: str) -> None:
    accelerator = Accelerator(cpu=True)
    net = small_net()
    model, optimizer = accelerator.prepare(net, make_optimizer(name, net, 0.05 if name == "sgd" else 5.0, 0.9, 1e-4, False))
    images, labels = torch.randn(10, 3, 8, 8), torch.arange(10) % 5
    losses = []
    for _ in range(60):
        loss = F.cross_entropy(model(images), labels)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_scaled_for_float16_make_the_same_step(name: str) -> None:
    plain, scaled = small_net(), small_net()
    scaler: Any = torch.amp.GradScaler("cpu", init_scale=1024.0)
    images, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    for net, is_scaled in ((plain, False), (scaled, True)):
        optimizer = make_optimizer(name, net, 0.1, 0.9, 0.01, False)
        loss = F.cross_entropy(net(images), labels)
        if is_scaled:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        else:
            loss.backward()
            optimizer.step()
    for ours, theirs in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    before = [parameter.detach().clone() for parameter in scaled.parameters()]
    scaler.scale(F.cross_entropy(scaled(images * float("nan")), labels)).backward()
    scaler.step(optimizer)  # skipped
    assert all(torch.equal(old, parameter.detach()) for old, parameter in zip(before, scaled.parameters(), strict=True))


def test_rates_go_with_the_batch() -> None:
    """Goyal et al. 2017: 0.1 for 256 images, 3.2 for 8192."""
    assert [scaled_rate(0.1, batch) for batch in (256, 8192, 64)] == pytest.approx([0.1, 3.2, 0.025])
