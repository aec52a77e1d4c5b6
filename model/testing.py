"""Accuracy of a classifier: one pass over the batches counts the confusion matrix and the top-5 hits of each class."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

Reduce = Callable[[torch.Tensor], torch.Tensor]  # sums counts over processes


def _one_process(counts: torch.Tensor) -> torch.Tensor:
    return counts


@dataclass(frozen=True, eq=False)
class Accuracy:
    """Counts of images.

    confusion: int64 (classes, classes), rows are labels, columns predictions. top5_correct: int64 (classes,), for each label the
    number of its images with the label among the five highest scores (with fewer than five classes: all of them).
    """

    confusion: torch.Tensor
    top5_correct: torch.Tensor

    @property
    def images(self) -> int:
        return int(self.confusion.sum())

    @property
    def top1_rate(self) -> float:
        return float(self.confusion.diagonal().sum()) / max(self.images, 1)

    @property
    def top5_rate(self) -> float:
        return float(self.top5_correct.sum()) / max(self.images, 1)


class AccuracyMeter:
    """Accumulates counts on the device, without synchronizing before `compute`."""

    def __init__(self, classes: int, device: torch.device) -> None:
        self._confusion = torch.zeros(classes, classes, dtype=torch.int64, device=device)
        self._top5_correct = torch.zeros(classes, dtype=torch.int64, device=device)

    def update(self, scores: torch.Tensor, labels: torch.Tensor) -> None:
        """Count N images. scores: (N, classes), logits or probabilities. labels: int64 (N,)."""
        classes = len(self._top5_correct)
        best = scores.float().topk(min(5, classes)).indices
        ones = torch.ones_like(labels)
        self._confusion.view(-1).index_add_(0, labels * classes + best[:, 0], ones)  # torch.bincount would synchronize
        self._top5_correct.index_add_(0, labels, (best == labels[:, None]).any(dim=1).long())

    def compute(self, reduce: Reduce = _one_process) -> Accuracy:
        """The counts so far, on the CPU. reduce: sums counts over processes."""
        return Accuracy(reduce(self._confusion).cpu(), reduce(self._top5_correct).cpu())


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    classes: int,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[object]],
    reduce: Reduce = _one_process,
) -> Accuracy:
    """The accuracy of `model`, in evaluation mode, on batches of (images, labels). Its mode is restored afterwards.

    A batch may hold several views of each image, next to each other: their softmax probabilities are averaged, as in
    `model.schemes`. autocast: returns the context manager in which the forward pass runs. reduce: sums counts over processes.
    `model` must be the bare module, without DistributedDataParallel: ranks may hold different numbers of batches, so its forward
    must not communicate.
    """
    was_training = model.training
    model.eval()
    meter = AccuracyMeter(classes, device)
    for images, labels in batches:
        with autocast():
            logits = model(images)
        if len(images) > len(labels):
            logits = logits.float().softmax(dim=1).view(len(labels), -1, classes).mean(dim=1)
        meter.update(logits, labels)
    model.train(was_training)
    return meter.compute(reduce)
