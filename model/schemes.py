"""Testing schemes of He et al. 2015, section 3.4: which pictures of an image a net sees, and how their scores become one.

- `centre`: the central crop of the image at the net's short side for evaluation.
- `centre-flip`: that and its mirror image, as train.py's --flip-test has it (not in the paper).
- `ten-crop`: the four corners' crops, the central one, and their mirror images (Krizhevsky et al. 2012, section 4.1), which He et
  al. use for comparison studies (Table 3).
- `multi-scale`: for their best results (Tables 4 and 5) "we adopt the fully-convolutional form as in [41, 13], and average the
  scores at multiple scales (images are resized such that the shorter side is in {224, 256, 384, 480, 640})". [41] is Simonyan and
  Zisserman 2015, whose section 3.2 says how: the net is applied to the whole image and to its mirror image.

Scores are softmax probabilities. He et al. do not say; the two papers that they follow do: Krizhevsky et al. average "the
predictions made by the network's softmax layer on the ten patches", Simonyan and Zisserman "the soft-max class posteriors" over
mirror images, scales (section 4.2) and nets (section 4.5). Within one picture of the fully convolutional form it is the class
scores before the softmax that are averaged over places (their section 3.2), and here that is what a net's forward does: averaging
the last feature map and then applying fc equals applying fc at each place, as a 1x1 convolution, and averaging that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from model.weights import ModelConfig
from pipeline.engines.multiview import MultiViewBatch, ViewSpec
from pipeline.pixels.normalize import Normalization, normalize_tensor
from pipeline.plan import sampling
from pipeline.plan.geometry import CentreCrop, TenCrop, WholeImage

SCHEMES = ("centre", "centre-flip", "ten-crop", "multi-scale")
SCALES = (224, 256, 384, 480, 640)  # short sides for nets of crops of 224; for others in proportion


def view_specs_of(scheme: str, recipe: ModelConfig, scales: Sequence[int] | None = None) -> dict[str, ViewSpec]:
    """The looks whose pictures a scheme averages, by name. scales: short sides, pixels, of multi-scale (default: SCALES)."""
    size, short = recipe.image_size, recipe.eval_short
    if scheme == "centre":
        return {"centre": ViewSpec(CentreCrop(short), size)}
    if scheme == "centre-flip":
        return {"centre-flip": ViewSpec(CentreCrop(short, mirrored=True), size)}
    if scheme == "ten-crop":
        return {"ten-crop": ViewSpec(TenCrop(short), size)}
    shorts = scales or [sampling.short_at(scale, size) for scale in SCALES]
    # A whole image has the same pictures whatever a net's crops are: nets share the look.
    return {f"scale-{short}": ViewSpec(WholeImage(short, mirrored=True), short) for short in shorts}


class Classifier:
    """A net on a device, with the schemes that it is tested by. looks: all that they need, each once."""

    def __init__(
        self,
        name: str,
        net: nn.Module,
        recipe: ModelConfig,
        schemes: Sequence[str],
        scales: Sequence[int] | None = None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 256,
    ) -> None:
        """name: for people. dtype: of the images; below float32 the forward is autocast to it. batch_size: crops in a forward;
        whole images come in as many as have no more pixels.
        """
        self.name = name
        self._device, self._dtype = torch.device(device), dtype
        self._net = net.eval().to(self._device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._schemes = {scheme: view_specs_of(scheme, recipe, scales) for scheme in schemes}
        self._most_pixels = batch_size * recipe.image_size**2
        stored = Normalization.of(recipe.mean, recipe.std)
        self._normalizers = {
            look: self._tail(stored, look) for view_specs in self._schemes.values() for look in view_specs.values()
        }

    @property
    def view_specs(self) -> list[ViewSpec]:
        return list(self._normalizers)

    @torch.inference_mode()
    def probabilities(self, batch: MultiViewBatch) -> dict[str, torch.Tensor]:
        """Each scheme's probabilities of N images, float32 (N, classes) on the device; multi-scale's scales alone, too, by
        `view_specs_of`'s names. The batch may hold pictures of other nets' looks, too."""
        of_look = {look: self._of_pictures(batch.pictures[look], look).view(len(batch.ids), -1) for look in self.view_specs}
        found: dict[str, torch.Tensor] = {}
        for scheme, view_specs in self._schemes.items():
            found[scheme] = torch.stack([of_look[look] for look in view_specs.values()]).mean(dim=0)
            found |= {name: of_look[look] for name, look in view_specs.items()}
        return found

    def _of_pictures(self, pictures: torch.Tensor, look: ViewSpec) -> torch.Tensor:
        """Mean probabilities of each image's pictures, float32 (N, classes). pictures: uint8 (N * crops, H, W, 3)."""
        _, height, width, _ = pictures.shape
        mean, std = self._normalizers[look]
        found = []
        for part in pictures.split(max(1, self._most_pixels // (height * width))):
            images = normalize_tensor(part, torch.zeros(len(part), 3, device=part.device), mean, std, self._dtype)
            with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
                logits = self._net(images)
            found.append(logits.float().softmax(dim=1))
        every = torch.cat(found)
        return every.view(-1, look.geometry.crops, every.shape[1]).mean(dim=1)

    def _tail(self, stored: Normalization, look: ViewSpec) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation of a look's pictures. A mean image belongs to places in a crop; whole images get its own mean."""
        whole = isinstance(look.geometry, WholeImage)
        normalization = stored.per_channel() if whole else stored.at(look.size)
        return tuple(torch.from_numpy(array).to(self._device) for array in (normalization.mean, normalization.std))  # type: ignore[return-value]
