"""Mixup and CutMix as pure functions: the mixture depends only on (seed, epoch, position in the epoch).

Each image at an even position of the epoch forms a pair with the next one, and the two are mixed with each other. Pairs are never
split between ranks or parts of a batch, so the mixed images do not depend on the number of ranks or parts, nor on restarts.

Sources:
- Mixup, a x + (1 - a) y with a ~ Beta(alpha, alpha): Zhang, Cisse, Dauphin, Lopez-Paz 2018, "mixup: beyond empirical risk
  minimization".
- CutMix, a box of y in x: Yun et al. 2019, "CutMix: regularization strategy to train strong classifiers with localizable
  features", section 3.1. The box's centre is uniform and its sides are sqrt(1 - a) times the image's. The box is clipped to
  the image, and a becomes the share of x that remains visible.
- Random numbers: `training.uniforms`, with the number of the pair as the position.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy.special import betaincinv

from pipeline.buffers import to_device
from pipeline.errors import UserError
from training.uniforms import Stream, uniforms

Floats = npt.NDArray[np.float32]


class Mixes(NamedTuple):
    """How each of N images is mixed with the other image of its pair.

    share: float32 (N,), the image's own share of the mixed image, which is also the weight of its label (lambda in the papers).
    opacity: float32 (N,), the image's own weight outside of the box: 1 in CutMix, `share` in mixup. boxes: float32 (N, 4), the
    box in which the other image is pasted: top, left, bottom, right in whole pixels; empty in mixup.
    """

    share: Floats
    opacity: Floats
    boxes: Floats


class Mixing:
    """Draws the parameters of mixup or CutMix for each pair. If both are on, each has probability 1/2."""

    def __init__(self, mixup: float, cutmix: float, seed: int, batch_size: int, processes: int = 1, accumulate: int = 1) -> None:
        """mixup, cutmix: their alphas, 0 for off. batch_size: global. Raises UserError if a rank or part would split a pair."""
        if not (0 <= mixup < float("inf") and 0 <= cutmix < float("inf")):
            raise UserError(f"`mixup` {mixup:g} and `cutmix` {cutmix:g} must not be negative")
        if batch_size % (2 * processes * accumulate):
            raise UserError(
                f"`batch_size` {batch_size} must be a multiple of 2 x processes x `accumulate` ({2 * processes * accumulate}), "
                "as `mixup` and `cutmix` mix pairs of images",
                "change `batch_size` or `accumulate`",
            )
        self.mixup, self.cutmix, self.seed = mixup, cutmix, seed

    def draw(self, epoch: int, low: int, high: int, size: tuple[int, int]) -> Mixes:
        """The mixes of the images at positions [low, high) of an epoch, both even. size: height and width of the images, pixels.

        Other sizes give the same boxes in proportion, up to rounding to whole pixels.
        """
        if low % 2 or high % 2:
            raise ValueError(f"positions {low} to {high} split a pair")
        uniform, choice, *centre = uniforms(self.seed, Stream.MIX, epoch, low // 2, high // 2, 4).T
        is_mixup = choice < 0.5 if self.mixup and self.cutmix else np.full(len(uniform), bool(self.mixup))
        share = np.where(is_mixup, _beta(self.mixup, uniform), _beta(self.cutmix, uniform))
        boxes = _boxes(share, np.stack(centre, 1), size)
        boxes[is_mixup] = 0
        height, width = size
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        opacity = np.where(is_mixup, share, 1.0)
        share = np.where(is_mixup, share, 1 - area / (height * width))
        return Mixes(*(np.repeat(of_pair, 2, axis=0).astype(np.float32) for of_pair in (share, opacity, boxes)))


def _beta(alpha: float, uniform: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Quantiles of Beta(alpha, alpha) at uniform numbers in [0, 1). For alpha 0 they are 1: the image is not mixed."""
    found: npt.NDArray[np.float64] = betaincinv(alpha, alpha, uniform) if alpha else np.ones_like(uniform)
    return found


def _boxes(share: npt.NDArray[np.float64], centre: npt.NDArray[np.float64], size: tuple[int, int]) -> npt.NDArray[np.float64]:
    """CutMix's boxes as in `Mixes`, (N, 4). share: (N,), before boxes are clipped to the image. centre: (N, 2) in [0, 1)."""
    half = np.sqrt(1 - share)[:, None] / 2
    edges = np.concatenate([np.maximum(centre - half, 0), np.minimum(centre + half, 1)], 1)
    return np.rint(edges * np.tile(size, 2))


def mix_images(images: torch.Tensor, mixes: Mixes) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixed images, (N, 3, H, W) of the same dtype and memory format, and the weights of their own labels, float32 (N,), on the
    same device. The arithmetic is in the images' dtype. Does not synchronize with the device.
    """
    count, _, height, width = images.shape
    table = to_device(np.column_stack(mixes), images.device)  # one transfer for all
    share, opacity, top, left, bottom, right = table[:, :, None, None].unbind(1)
    rows = torch.arange(height, device=images.device)[:, None]
    columns = torch.arange(width, device=images.device)
    is_inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)  # (N, H, W)
    of_other = torch.where(is_inside, 1.0, 1 - opacity).to(images.dtype)
    pairs = images.unflatten(0, (count // 2, 2))
    mixed = torch.lerp(pairs, pairs.flip(1), of_other.view(count // 2, 2, 1, height, width))
    return mixed.flatten(0, 1), share.flatten()


def mixed_loss(logits: torch.Tensor, labels: torch.Tensor, share: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """Mean cross entropy, weighted by `share` for an image's own label and by the rest for the other label of its pair.

    logits: (N, classes). labels: int64 (N,), of the images before mixing. share: (N,).
    """
    others = labels.view(-1, 2).flip(1).flatten()
    own, other = (F.cross_entropy(logits, one, reduction="none", label_smoothing=label_smoothing) for one in (labels, others))
    return torch.lerp(other, own, share.to(own.dtype)).mean()
