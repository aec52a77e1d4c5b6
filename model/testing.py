"""Testing a classifier: one pass over batches gives the counts that every figure comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass
class Score:
    """Counts over images seen. confusion: int64 (classes, classes), rows are labels, columns predictions. top5: int64 (classes,),
    images of each label found among the five highest logits (all of them where there are fewer than five classes)."""

    confusion: torch.Tensor
    top5: torch.Tensor

    @property
    def images(self) -> int:
        return int(self.confusion.sum())

    @property
    def top1_rate(self) -> float:
        return float(self.confusion.diagonal().sum()) / max(self.images, 1)

    @property
    def top5_rate(self) -> float:
        return float(self.top5.sum()) / max(self.images, 1)


class Tally:
    """Counts in the making, on the device; nothing waits for that before `score`."""

    def __init__(self, classes: int, device: torch.device) -> None:
        self._confusion = torch.zeros(classes, classes, dtype=torch.int64, device=device)
        self._top5 = torch.zeros(classes, dtype=torch.int64, device=device)

    def add(self, scores: torch.Tensor, labels: torch.Tensor) -> None:
        """Count N images. scores: (N, classes), logits or probabilities. labels: int64 (N,)."""
        classes = len(self._top5)
        best = scores.float().topk(min(5, classes)).indices
        ones = torch.ones_like(labels)
        self._confusion.view(-1).index_add_(0, labels * classes + best[:, 0], ones)  # bincount would wait for its largest number
        self._top5.index_add_(0, labels, (best == labels[:, None]).any(dim=1).long())

    def score(self, total: Callable[[torch.Tensor], torch.Tensor] = lambda counts: counts) -> Score:
        """What was counted. total: adds counts over processes."""
        return Score(total(self._confusion).cpu(), total(self._top5).cpu())


@torch.inference_mode()
def score(
    model: nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    classes: int,
    device: torch.device,
    autocast: Callable[[], Any],
    total: Callable[[torch.Tensor], torch.Tensor] = lambda counts: counts,
) -> Score:
    """Score `model` in evaluation mode on (images, labels) batches; its mode is restored. Where there are several images to a
    label, next to each other, their softmax probabilities are averaged, as `model.schemes` has it.

    autocast: makes the context that forward runs in. total: adds counts over processes. `model` must be the bare module: ranks
    may hold different numbers of batches, so its forward must not communicate.
    """
    was_training = model.training
    model.eval()
    tally = Tally(classes, device)
    for images, labels in batches:
        with autocast():
            logits = model(images)
        if len(images) > len(labels):
            logits = logits.float().softmax(dim=1).view(len(labels), -1, classes).mean(dim=1)
        tally.add(logits, labels)
    model.train(was_training)
    return tally.score(total)
