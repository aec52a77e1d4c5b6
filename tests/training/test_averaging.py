from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from model import ARCHS
from training.averaging import WeightEMA


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))


def disturb(net: nn.Module, seed: int) -> None:
    """Something like a step: other weights, BN statistics and counts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
        net.train()(torch.randn(5, 3, 8, 8, generator=generator))


def test_averages_are_the_formulas() -> None:
    """Warm-up and the decay's own value after it, over parameters and running statistics; counts are copied."""
    net = small_net()
    average = WeightEMA(net, 0.5)
    expected = {name: value.double().clone() for name, value in net.state_dict().items()}
    for step, decay in enumerate((1 / 10, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15, 7 / 16, 8 / 17, 0.5, 0.5, 0.5)):
        disturb(net, step)
        average.update(net)
        for name, value in net.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value.double()
        for name, value in average.net.state_dict().items():
            if name.endswith("num_batches_tracked"):
                assert int(value) == step + 1
            else:
                torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_without_warm_up_it_is_torchs_averaged_model() -> None:
    net = small_net()
    average = WeightEMA(net, 0.9)
    average.load_state_dict({"weights": net.state_dict(), "updates": 10**6})
    theirs = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    theirs.update_parameters(net)  # its first one copies
    for step in range(3):
        disturb(net, step)
        average.update(net)
        theirs.update_parameters(net)
    for ours, other in zip(average.net.parameters(), theirs.module.parameters(), strict=True):
        assert torch.equal(ours, other)
    assert not any(parameter.requires_grad for parameter in average.net.parameters())


def test_a_restart_goes_on_exactly(tmp_path: Path) -> None:
    net = small_net()
    whole = WeightEMA(net, 0.99)
    for step in range(3):
        disturb(net, step)
        whole.update(net)
    torch.save(whole.state_dict(), tmp_path / "average.pt")
    restarted = WeightEMA(small_net(), 0.99)
    restarted.load_state_dict(torch.load(tmp_path / "average.pt", weights_only=True))
    for step in range(3, 6):
        disturb(net, step)
        whole.update(net)
        restarted.update(net)
    state = restarted.state_dict()
    assert state["updates"] == 6
    for name, value in whole.state_dict()["weights"].items():
        assert torch.equal(value, state["weights"][name])


def test_the_net_averaged_stays_and_the_average_has_its_keys_and_format() -> None:
    net = ARCHS["resnet20"](num_classes=3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    average = WeightEMA(net, 0.9)
    other = ARCHS["resnet20"](num_classes=3)
    average.update(other)
    assert average.net.state_dict().keys() == before.keys()
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    assert not torch.equal(average.net.state_dict()["fc.weight"], before["fc.weight"])
    assert average.net.state_dict()["layer1.0.conv1.weight"].is_contiguous(memory_format=torch.channels_last)


def test_the_average_of_a_net_prepared_by_accelerate_answers_with_its_own_weights() -> None:
    """Accelerate gives a net a forward of its own in mixed precision, which a copy must not share."""
    AcceleratorState._reset_state(True)
    try:
        net = small_net()
        model = Accelerator(cpu=True, mixed_precision="bf16").prepare(net)
        average = WeightEMA(net, 0.9)
        images = torch.randn(4, 3, 8, 8)
        before = average.net.eval()(images)
        disturb(model, 0)
        assert torch.equal(average.net(images), before)
        assert not torch.equal(net.eval()(images), before)
    finally:
        AcceleratorState._reset_state(True)


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_decays_out_of_range_are_refused(decay: float) -> None:
    with pytest.raises(ValueError, match="decay must lie in"):
        WeightEMA(small_net(), decay)
