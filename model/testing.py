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


@torch.inference_mode()
def score(
    model: nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    classes: int,
    device: torch.device,
    autocast: Callable[[], Any],
    total: Callable[[torch.Tensor], torch.Tensor] = lambda counts: counts,
) -> Score:
    """Score `model` in evaluation mode on (images, labels) batches; its mode is restored.

    autocast: makes the context that forward runs in. total: adds counts over processes. `model` must be the bare module: ranks
    may hold different numbers of batches, so its forward must not communicate.
    """
    was_training = model.training
    model.eval()
    confusion = torch.zeros(classes * classes, dtype=torch.int64, device=device)
    top5 = torch.zeros(classes, dtype=torch.int64, device=device)
    for images, labels in batches:
        with autocast():
            logits = model(images)
        best = logits.float().topk(min(5, classes)).indices
        confusion += torch.bincount(labels * classes + best[:, 0], minlength=classes * classes)
        top5 += torch.bincount(labels[(best == labels[:, None]).any(dim=1)], minlength=classes)
    model.train(was_training)
    return Score(total(confusion).view(classes, classes).cpu(), total(top5).cpu())
