"""Testing schemes of He et al. 2015, section 3.4. A scheme defines the views of an image that are averaged into a prediction.

- `centre`: the central crop, after resizing the image to the model's short side for evaluation.
- `centre-flip`: the same and its mirror image, as with train.py's --flip-test (not in the paper).
- `ten-crop`: the four corner crops, the central one, and their mirror images (Krizhevsky et al. 2012, section 4.1), which He et
  al. use for comparison studies (Table 3).
- `multi-scale`: for their best results (Tables 4 and 5) "we adopt the fully-convolutional form as in [41, 13], and average the
  scores at multiple scales (images are resized such that the shorter side is in {224, 256, 384, 480, 640})". [41] is Simonyan and
  Zisserman 2015. Their section 3.2 describes it: the model is applied to the whole image and to its mirror image.

Scores are softmax probabilities. He et al. do not say so, but the two papers that they follow do: Krizhevsky et al. average "the
predictions made by the network's softmax layer on the ten patches", Simonyan and Zisserman "the soft-max class posteriors" over
mirror images, scales (section 4.2) and models (section 4.5). In the fully convolutional form, the class scores before the softmax
are averaged over the positions of an image (their section 3.2). A model's forward pass does exactly that: averaging the last
feature map and then applying fc equals applying fc at each position, as a 1x1 convolution, and averaging the results.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from model.weights import ModelConfig
from pipeline.engines.multiview import MultiViewBatch, ViewSpec
from pipeline.pixels.normalize import Normalization, normalize_tensor
from pipeline.plan import sampling
from pipeline.plan.geometry import CentreCrop, TenCrop, TorchvisionCrop, WholeImage

SCHEMES = ("centre", "centre-flip", "ten-crop", "multi-scale")
SCALES = (224, 256, 384, 480, 640)  # short sides for models with crops of 224; in proportion for others


def view_specs_of(scheme: str, config: ModelConfig, scales: Sequence[int] = ()) -> dict[str, ViewSpec]:
    """The views that a scheme averages, by name. scales: short sides for multi-scale, pixels; default: SCALES."""
    size, short = config.image_size, config.eval_short
    if scheme in ("centre", "centre-flip"):
        return {scheme: ViewSpec(central_crop(config, mirrored=scheme == "centre-flip"), size)}
    if scheme == "ten-crop":
        return {"ten-crop": ViewSpec(TenCrop(short), size)}
    shorts = scales or [sampling.short_at(scale, size) for scale in SCALES]
    # The size of a whole image does not depend on the model's crop, so models share these views.
    return {f"scale-{short}": ViewSpec(WholeImage(short, mirrored=True), short) for short in shorts}


def central_crop(config: ModelConfig, mirrored: bool = False) -> CentreCrop:
    """The central crop for a model's evaluation."""
    if config.resizing == "short":
        return CentreCrop(config.eval_short, mirrored)
    return TorchvisionCrop(config.eval_short, mirrored, square=config.resizing == "square")


class MultiViewClassifier:
    """A model on a device that predicts from several views of each image. view_specs: all views that its schemes need."""

    def __init__(
        self,
        name: str,
        model: nn.Module,
        config: ModelConfig,
        schemes: Sequence[str],
        scales: Sequence[int] = (),
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 256,
    ) -> None:
        """name: shown in tables. dtype: of the images; if it is not float32, the forward pass runs in autocast to it. batch_size:
        largest number of crops in one forward pass; whole images are limited to the same number of pixels.
        """
        self.name = name
        self._device, self._dtype = torch.device(device), dtype
        self._model = model.eval().to(self._device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._schemes = {scheme: view_specs_of(scheme, config, scales) for scheme in schemes}
        self._max_pixels = batch_size * config.image_size**2
        stored = Normalization.of(config.mean, config.std)
        self._normalizers = {
            view: self._normalizer(stored, view) for view_specs in self._schemes.values() for view in view_specs.values()
        }

    @property
    def view_specs(self) -> list[ViewSpec]:
        return list(self._normalizers)

    @torch.inference_mode()
    def probabilities(self, batch: MultiViewBatch) -> dict[str, torch.Tensor]:
        """Each scheme's probabilities for N images, float32 (N, classes) on the device; for multi-scale also those of each scale,
        named as in `view_specs_of`. The batch may contain further views, for other models."""
        by_view = {view: self._of_view(batch.images[view], view).view(len(batch.ids), -1) for view in self.view_specs}
        found: dict[str, torch.Tensor] = {}
        for scheme, view_specs in self._schemes.items():
            found[scheme] = torch.stack([by_view[view] for view in view_specs.values()]).mean(dim=0)
            found |= {name: by_view[view] for name, view in view_specs.items()}
        return found

    def _of_view(self, pixels: torch.Tensor, view: ViewSpec) -> torch.Tensor:
        """The mean probabilities over the crops of each image, float32 (N, classes). pixels: uint8 (N * crops, H, W, 3)."""
        _, height, width, _ = pixels.shape
        mean, std = self._normalizers[view]
        found = []
        for part in pixels.split(max(1, self._max_pixels // (height * width))):
            images = normalize_tensor(part, torch.zeros(len(part), 3, device=part.device), mean, std, self._dtype)
            with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
                logits = self._model(images)
            found.append(logits.float().softmax(dim=1))
        probabilities = torch.cat(found)
        return probabilities.view(-1, view.geometry.crops, probabilities.shape[1]).mean(dim=1)

    def _normalizer(self, stored: Normalization, view: ViewSpec) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation for a view, on the device. A mean image fits crops only: whole images use its average."""
        whole = isinstance(view.geometry, WholeImage)
        normalization = stored.per_channel() if whole else stored.at(view.size)
        return torch.from_numpy(normalization.mean).to(self._device), torch.from_numpy(normalization.std).to(self._device)
