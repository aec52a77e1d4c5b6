"""The training step never synchronizes with the GPU, and all of it is in channels-last memory. What it computes is tested in
test_flags.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from tests.layout import LayoutCheck
from training.command_line import parse_arguments
from training.learner import Learner
from training.loaders import open_loaders
from training.metrics import Meter, NonFiniteLoss
from training.uniforms import Stream, uniforms

OPTIONS = (
    "--arch", "resnet18", "--batch-size", "16", "--image-size", "64", "--amp", "bf16", "--accumulate", "2", "--ema", "0.9",
    "--mixup", "0.2", "--cutmix", "1", "--drop-path", "0.1", "--label-smoothing", "0.1", "--no-norm-decay",
)  # fmt: skip


@pytest.fixture
def strict() -> Iterator[None]:
    """After the test, reset torch's sync debug mode, in which synchronization with the GPU is an error."""
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_no_step_synchronizes_with_the_gpu(optimizer: str, small_shards: Path) -> None:
    options = parse_arguments(None, ["--data", str(small_shards), "--optimizer", optimizer, *OPTIONS])
    accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=2)
    loader = open_loaders(options, accelerator)[0]
    learner = Learner(options, accelerator, loader)
    learner.prepare(loader, None)
    non_finite = NonFiniteLoss(accelerator.device)
    batches = list(loader)  # the loader may synchronize, in its own thread
    for step, batch in enumerate(batches):
        if step == 1:  # the first step initializes
            torch.cuda.set_sync_debug_mode("error")
        loss, _ = learner.step(batch, 0, 16 * step, 0.1)
        non_finite.add(step, loss)
    torch.cuda.set_sync_debug_mode("default")
    assert non_finite.read(accelerator.gather) is None


class Waits(TorchDispatchMode):
    """Notes which operations would make the host wait for a GPU: those whose result Python or the allocation of memory needs."""

    NAMES = ("_local_scalar_dense", "nonzero", "equal.default", "masked_select", "unique", "bincount")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        indices = args[1] if "index" in str(func) and len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
        is_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        if is_mask or any(str(func).startswith(f"aten.{name}") for name in self.NAMES):
            self.found.append(str(func))
        return func(*args, **kwargs or {})


@pytest.mark.usefixtures("one_core")
@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_a_step_reads_no_result_back_and_leaves_no_gradients(optimizer: str, small_shards: Path) -> None:
    """What a machine without a GPU can test: all layers are channels-last, and no operation needs the value of a tensor."""
    with Waits() as seen:
        torch.ones(1).item()
        torch.ones(2)[torch.tensor([True, False])]
    assert len(seen.found) == 2
    words = ["--data", str(small_shards), "--optimizer", optimizer, *OPTIONS, "--batch-size", "8", "--image-size", "48"]
    options = parse_arguments(None, words)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    loader = open_loaders(options, accelerator)[0]
    learner = Learner(options, accelerator, loader)
    layout = LayoutCheck(learner.model)
    learner.prepare(loader, None)
    non_finite, meter = NonFiniteLoss(accelerator.device), Meter(accelerator.device)
    batch = next(iter(loader))
    with Waits() as seen:
        for step in range(2):
            loss, top1 = learner.step(batch, 0, 8 * step, 0.1)
            non_finite.add(step, loss)
            meter.add(loss, top1)
    assert seen.found == []
    assert layout.others() == []
    assert layout.tensors > 100
    assert all(parameter.grad is None for parameter in learner.model.parameters())


def test_each_rank_and_part_drops_blocks_by_the_images_positions(small_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--data", str(small_shards), "--arch", "resnet18", "--image-size", "32", "--batch-size", "16"]
    options = parse_arguments(None, [*words, "--accumulate", "2", "--drop-path", "0.5", "--seed", "6"])
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    loader = open_loaders(options, accelerator)[0]
    learner = Learner(options, accelerator, loader)
    learner.prepare(loader, None)
    seen: list[torch.Tensor] = []
    learner.model.register_forward_pre_hook(lambda model, inputs: seen.append(inputs[1]))
    batch = next(iter(loader))
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    for rank in range(2):
        monkeypatch.setattr(Accelerator, "process_index", rank)
        part = batch._replace(images=batch.images[8 * rank : 8 * rank + 8], labels=batch.labels[8 * rank : 8 * rank + 8])
        learner.step(part, 3, 32, 0.1)
    assert [len(one) for one in seen] == [4, 4, 4, 4]
    expected = uniforms(6, Stream.DROP, 3, 32, 48, 8)
    torch.testing.assert_close(torch.cat(seen), torch.from_numpy(expected).float(), rtol=0, atol=0)


def test_the_first_non_finite_loss_is_found() -> None:
    non_finite = NonFiniteLoss(torch.device("cpu"))
    for step, loss in enumerate((1.0, 2.0)):
        non_finite.add(step, torch.tensor(loss))
    assert non_finite.read(lambda tensor: tensor) is None
    for step, loss in enumerate((float("nan"), 1.0, float("inf")), 7):
        non_finite.add(step, torch.tensor(loss))
    assert non_finite.read(lambda tensor: tensor) == 7
    assert non_finite.read(lambda tensor: torch.stack([tensor, torch.tensor(3)])) == 3  # found by another rank
