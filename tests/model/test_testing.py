from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import nn

from model.testing import AccuracyMeter, evaluate


class Identity(nn.Module):
    """A model that returns its input as logits."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_counts_equal_a_plain_count() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(100, 9), torch.randint(0, 9, (100,))
    model = Identity().train()
    batches = zip(logits.split(32), labels.split(32), strict=True)
    result = evaluate(model, batches, 9, torch.device("cpu"), nullcontext)
    ranks = logits.argsort(dim=1, descending=True).tolist()
    confusion = torch.zeros(9, 9, dtype=torch.int64)
    top5 = torch.zeros(9, dtype=torch.int64)
    for label, ranked in zip(labels.tolist(), ranks, strict=True):
        confusion[label, ranked[0]] += 1
        top5[label] += label in ranked[:5]
    assert torch.equal(result.of_class, confusion.sum(dim=1))
    assert torch.equal(result.top1_correct, confusion.diagonal())
    assert torch.equal(result.top5_correct, top5)
    assert result.confusion is None  # its size is the square of the number of classes
    meter = AccuracyMeter(9, torch.device("cpu"), confusion=True)
    meter.update(logits, labels)
    counted = meter.compute().confusion
    assert counted is not None
    assert torch.equal(counted, confusion)
    assert result.images == 100
    assert result.top1_rate == sum(label == ranked[0] for label, ranked in zip(labels.tolist(), ranks, strict=True)) / 100
    assert result.top5_rate == int(top5.sum()) / 100
    assert model.training


def test_fewer_than_five_classes_and_no_batches() -> None:
    result = evaluate(Identity(), [(torch.eye(3), torch.tensor([0, 2, 2]))], 3, torch.device("cpu"), nullcontext)
    assert (result.top1_rate, result.top5_rate) == (2 / 3, 1.0)
    assert evaluate(Identity(), [], 3, torch.device("cpu"), nullcontext).images == 0


def test_probabilities_count_like_logits_and_processes_are_summed() -> None:
    torch.manual_seed(1)
    logits, labels = torch.randn(60, 7), torch.randint(0, 7, (60,))
    meter = AccuracyMeter(7, torch.device("cpu"))
    for part, targets in zip(logits.split(25), labels.split(25), strict=True):
        meter.update(part.softmax(dim=1), targets)
    plain = evaluate(Identity(), [(logits, labels)], 7, torch.device("cpu"), nullcontext)
    assert torch.equal(meter.compute().top1_correct, plain.top1_correct)
    assert torch.equal(meter.compute().top5_correct, plain.top5_correct)
    doubled = meter.compute(lambda counts: counts * 2)
    assert doubled.images == 120
    assert torch.equal(doubled.top5_correct, plain.top5_correct * 2)
