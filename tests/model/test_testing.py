from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import nn

from model.testing import Tally, score


class Given(nn.Module):
    """Its logits are its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_scores_are_those_of_a_plain_count() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(100, 9), torch.randint(0, 9, (100,))
    net = Given().train()
    batches = zip(logits.split(32), labels.split(32), strict=True)
    result = score(net, batches, 9, torch.device("cpu"), nullcontext)
    ranks = logits.argsort(dim=1, descending=True).tolist()
    confusion = torch.zeros(9, 9, dtype=torch.int64)
    top5 = torch.zeros(9, dtype=torch.int64)
    for label, ranked in zip(labels.tolist(), ranks, strict=True):
        confusion[label, ranked[0]] += 1
        top5[label] += label in ranked[:5]
    assert torch.equal(result.confusion, confusion)
    assert torch.equal(result.top5, top5)
    assert result.images == 100
    assert result.top1_rate == sum(label == ranked[0] for label, ranked in zip(labels.tolist(), ranks, strict=True)) / 100
    assert result.top5_rate == int(top5.sum()) / 100
    assert net.training


def test_fewer_than_five_classes_and_no_batches() -> None:
    result = score(Given(), [(torch.eye(3), torch.tensor([0, 2, 2]))], 3, torch.device("cpu"), nullcontext)
    assert (result.top1_rate, result.top5_rate) == (2 / 3, 1.0)
    assert score(Given(), [], 3, torch.device("cpu"), nullcontext).images == 0


def test_probabilities_count_as_their_logits_do_and_processes_add_up() -> None:
    torch.manual_seed(1)
    logits, labels = torch.randn(60, 7), torch.randint(0, 7, (60,))
    tally = Tally(7, torch.device("cpu"))
    for part, targets in zip(logits.split(25), labels.split(25), strict=True):
        tally.add(part.softmax(dim=1), targets)
    plain = score(Given(), [(logits, labels)], 7, torch.device("cpu"), nullcontext)
    assert torch.equal(tally.score().confusion, plain.confusion)
    assert torch.equal(tally.score().top5, plain.top5)
    doubled = tally.score(lambda counts: counts * 2)
    assert doubled.images == 120
    assert torch.equal(doubled.top5, plain.top5 * 2)
