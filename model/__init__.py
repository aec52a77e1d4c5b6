"""The ResNets of He et al. 2015, and what is done with their weights: `ARCHS[name](num_classes=1000)` makes a model.

In reading order:

- resnet: the models and their names, `ARCHS`. blur: their BlurPool variants. describe: parameters and multiply-adds.
- weights: weight files and `ModelConfig`, the architecture, classes and preprocessing in their header. loading: models from such
  files, and from those of torchvision, timm and the Hugging Face Hub.
- testing: top-1, top-5 and the confusion matrix. schemes: central crop, ten crops and multi-scale testing. ensembles: averages of
  several models' predictions.
- exporting: ONNX and torch.export. card: timm's config.json and the model card.
"""

from __future__ import annotations

from model.resnet import ARCHS, ResNet

__all__ = ["ARCHS", "ResNet"]
