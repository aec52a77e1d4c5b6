"""Accuracy of a classifier: one pass over the batches counts the hits of each class and, on request, the confusion matrix."""

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

    of_class, top1_correct, top5_correct: int64 (classes,), for each label the number of its images, of those with the label as
    the highest score, and of those with it among the five highest (with fewer than five classes: all of them). confusion: int64
    (classes, classes), rows are labels, columns predictions, or None.
    """

    of_class: torch.Tensor
    top1_correct: torch.Tensor
    top5_correct: torch.Tensor
    confusion: torch.Tensor | None = None

    @property
    def images(self) -> int:
        return int(self.of_class.sum())

    @property
    def top1_rate(self) -> float:
        return float(self.top1_correct.sum()) / max(self.images, 1)

    @property
    def top5_rate(self) -> float:
        return float(self.top5_correct.sum()) / max(self.images, 1)


class AccuracyMeter:
    """Accumulates counts on the device, without synchronizing before `compute`."""

    def __init__(self, classes: int, device: torch.device, confusion: bool = False) -> None:
        """confusion: also count the confusion matrix, which takes 8 * classes^2 bytes."""
        self._counts = torch.zeros(3, classes, dtype=torch.int64, device=device)
        self._confusion = torch.zeros(classes, classes, dtype=torch.int64, device=device) if confusion else None

    def update(self, scores: torch.Tensor, labels: torch.Tensor) -> None:
        """Count N images. scores: (N, classes), logits or probabilities. labels: int64 (N,)."""
        classes = self._counts.shape[1]
        best = scores.float().topk(min(5, classes)).indices
        hits = best == labels[:, None]
        ones = torch.ones_like(labels)
        # torch.bincount would synchronize.
        self._counts.index_add_(1, labels, torch.stack([ones, hits[:, 0].long(), hits.any(dim=1).long()]))
        if self._confusion is not None:
            self._confusion.view(-1).index_add_(0, labels * classes + best[:, 0], ones)

    def compute(self, reduce: Reduce = _one_process) -> Accuracy:
        """The counts so far, on the CPU. reduce: sums counts over processes."""
        confusion = None if self._confusion is None else reduce(self._confusion).cpu()
        of_class, top1, top5 = reduce(self._counts).cpu()
        return Accuracy(of_class, top1, top5, confusion)


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
