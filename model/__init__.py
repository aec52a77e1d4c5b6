"""Models: `ARCHS` maps a name to its constructor, `ARCHS[name](num_classes=1000)`."""

from __future__ import annotations

from model.resnet import ARCHS, ResNet

__all__ = ["ARCHS", "ResNet"]
