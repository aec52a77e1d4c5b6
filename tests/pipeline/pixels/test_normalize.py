from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from pipeline.pixels import normalize, reference
from pipeline.plan import sampling
from tests.helpers import random_image

# Covariance of ImageNet's RGB in 0..1, from the eigenbasis that fb.resnet.torch published and everyone since has copied.
PUBLISHED_VALUES = np.array([0.2175, 0.0188, 0.0045])
PUBLISHED_VECTORS = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
COVARIANCE = PUBLISHED_VECTORS @ np.diag(PUBLISHED_VALUES) @ PUBLISHED_VECTORS.T

ZERO = normalize.Normalization.of([0, 0, 0])
NO_LIGHT = np.zeros((3, 3), np.float32)


def window(short: int, top: int, left: int, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """A 100 x 100 crop at a corner of an image of `size` (height, width) that is resized exactly, in source pixels."""
    scale = min(size) / short
    return top * scale, left * scale, (top + 100) * scale, (left + 100) * scale


@pytest.mark.parametrize(
    ("size", "short", "corner"),
    [
        ((300, 400), 150, (20, 60)),
        ((300, 400), 150, (0, 0)),
        ((300, 400), 150, (50, 100)),
        ((120, 90), 180, (70, 3)),
        ((200, 200), 200, (9, 31)),
    ],
)
def test_the_reference_equals_resize_then_crop(size: tuple[int, int], short: int, corner: tuple[int, int]) -> None:
    """The expected crop is a slice of the whole image, resized by Pillow: reduced, enlarged and unchanged, by exact factors."""
    height, width = size
    image = Image.fromarray(random_image(height, width, 3))
    whole = np.asarray(image.resize((width * short // min(size), height * short // min(size)), Image.Resampling.BILINEAR))
    top, left = corner
    expected = whole[top : top + 100, left : left + 100].astype(int)
    found = reference.resample(image, window(short, top, left, size), False, (100, 100))
    assert np.abs(found - expected).max() <= 1


def test_flip_mirrors_left_to_right() -> None:
    image = Image.fromarray(random_image(300, 400))
    plain, flipped = (reference.resample(image, (6, 80, 206, 280), flip, (100, 100)) for flip in (False, True))
    assert np.array_equal(flipped, np.fliplr(plain))
    assert not np.array_equal(flipped, plain)


def test_grey_palette_and_cmyk_become_rgb() -> None:
    for mode in ("L", "P", "CMYK", "RGBA"):
        image = Image.fromarray(random_image(120, 130)).convert(mode)
        assert reference.resample(image, (1, 2, 100, 110), False, (100, 70)).shape == (100, 70, 3)


def test_orientation_tags_are_ignored() -> None:
    import io

    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    Image.fromarray(random_image(120, 200)).save(stream, "JPEG", exif=exif)
    image = Image.open(stream)
    assert image.size == (200, 120)
    place = (0, 80, 120, 200), False, (100, 100)
    assert np.array_equal(reference.resample(image, *place), reference.resample(image.convert("RGB"), *place))


def test_translation_equals_padding_and_cropping() -> None:
    """Every shift that leaves at least one pixel visible, on both axes, in NumPy and in torch, compared with Pillow."""
    shift = np.array([(down, right) for down in range(-6, 7) for right in range(-8, 9)])
    images = np.random.default_rng(0).integers(1, 256, (len(shift), 7, 9, 3), np.uint8)
    expected = []
    for pixels, (down, right) in zip(images, shift.tolist(), strict=True):
        padded = ImageOps.expand(Image.fromarray(pixels), border=8, fill=0)
        expected.append(np.asarray(padded.crop((8 - right, 8 - down, 17 - right, 15 - down))))
    before = images.copy()
    assert np.array_equal(normalize.translate(images, shift), np.stack(expected))
    found = normalize.translate_tensor(torch.from_numpy(images), torch.from_numpy(shift))
    assert found.dtype == torch.uint8
    assert found.is_contiguous()
    assert np.array_equal(found.numpy(), np.stack(expected))
    assert np.array_equal(images, before)


@pytest.mark.gpu
def test_translation_on_a_gpu_equals_the_reference_and_never_synchronizes() -> None:
    rng = np.random.default_rng(0)
    images, shift = rng.integers(1, 256, (64, 32, 32, 3), np.uint8), rng.integers(-31, 32, (64, 2))
    pixels, shifts = torch.from_numpy(images).cuda(), torch.from_numpy(shift).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = normalize.translate_tensor(pixels, shifts)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert np.array_equal(found.cpu().numpy(), normalize.translate(images, shift))


@pytest.mark.parametrize("corner", [(-4, -3), (-4, 5), (0, 0), (12, 3), (14, -1), (16, 20)])
@pytest.mark.parametrize("flip", [False, True])
def test_the_reference_pads_with_black_before_normalization(corner: tuple[int, int], flip: bool) -> None:
    """Crops of 32 from 44 x 48 padded by 4, in torchvision's order: pad, crop, mirror, then subtract the mean."""
    image = Image.fromarray(random_image(44, 48))
    top, left = corner
    crop = ImageOps.expand(image, border=4, fill=0).crop((left + 4, top + 4, left + 36, top + 36))
    pixels = np.asarray(ImageOps.mirror(crop) if flip else crop).astype(np.float32)
    inside = min(max(top, 0), 44 - 32), min(max(left, 0), 48 - 32)
    shift = inside[0] - top, (inside[1] - left) * (-1 if flip else 1)
    window = (*inside, inside[0] + 32, inside[1] + 32)
    basis, alphas = normalize.lighting_basis(COVARIANCE), np.array([0.1, -0.2, 0.3], np.float32)
    normalization = normalize.Normalization.of([120, 110, 100], [58, 57, 56])
    found = reference.apply(image, window, flip, alphas, (32, 32), basis, normalization, shift)
    light = normalize.lighting(alphas[None], basis)
    assert np.allclose(found, (pixels + light - normalization.mean) / normalization.std, atol=1e-5)


def test_lighting_follows_alexnets_formula() -> None:
    """[p1, p2, p3] [a1 l1, a2 l2, a3 l3]^T, written out. A component's sign is arbitrary, so each may be negated."""
    basis = normalize.lighting_basis(COVARIANCE)
    for component in range(3):
        alphas = np.zeros((1, 3), np.float32)
        alphas[0, component] = 0.1
        expected = PUBLISHED_VECTORS[:, component] * 0.1 * PUBLISHED_VALUES[component] * 255
        found = normalize.lighting(alphas, basis)[0]
        assert min(np.abs(found - expected).max(), np.abs(found + expected).max()) < 0.01


def test_an_images_lighting_does_not_depend_on_its_batch() -> None:
    """To the bit: a run that continues with another batch size has the same pixels."""
    basis, alphas = normalize.lighting_basis(COVARIANCE), sampling.alphas(0, 0, np.arange(300))
    together = normalize.lighting(alphas, basis)
    for size in (1, 2, 5, 16):
        parts = [normalize.lighting(alphas[first : first + size], basis) for first in range(0, 300, size)]
        assert np.array_equal(np.concatenate(parts), together)


def test_lighting_has_the_specified_covariance() -> None:
    basis = normalize.lighting_basis(COVARIANCE)
    count = 100_000
    shifts = normalize.lighting(sampling.alphas(0, 0, np.arange(count)), basis)
    expected = 0.01 * 255**2 * PUBLISHED_VECTORS @ np.diag(PUBLISHED_VALUES**2) @ PUBLISHED_VECTORS.T
    assert np.allclose(np.cov(shifts.T), expected, atol=0.03 * expected.max())
    assert np.abs(shifts.mean(axis=0)).max() < 0.1


def test_eigenbasis_rebuilds_the_covariance() -> None:
    values, vectors = normalize.eigenbasis(COVARIANCE)
    assert np.allclose(vectors @ np.diag(values) @ vectors.T, COVARIANCE)
    assert list(values) == sorted(values, reverse=True)
    assert (vectors[np.abs(vectors).argmax(axis=0), range(3)] > 0).all()


@pytest.mark.parametrize("per_pixel", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_normalization_of_tensors_equals_the_reference(per_pixel: bool, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    mean = rng.uniform(90, 130, (100, 100, 3) if per_pixel else 3)
    normalization = normalize.Normalization.of(mean, (58.0, 57.0, 57.5))
    basis = normalize.lighting_basis(COVARIANCE)
    image = Image.fromarray(random_image(300, 400))
    places = [((14, 60, 214, 260), True), ((0, 25.5, 210.25, 240), False)]
    alphas = np.array([[0.1, -0.2, 0.3], [-0.1, 0.0, 0.05]], np.float32)
    size = (100, 100)
    expected = np.stack(
        [reference.apply(image, *place, light, size, basis, normalization) for place, light in zip(places, alphas, strict=True)]
    )
    pixels = torch.from_numpy(np.stack([reference.resample(image, *place, size) for place in places]))
    shift = torch.from_numpy(normalize.lighting(alphas, basis))
    found = normalize.normalize_tensor(
        pixels, shift, torch.from_numpy(normalization.mean), torch.from_numpy(normalization.std), dtype
    )
    assert found.shape == (2, 3, 100, 100)
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    assert np.abs(found.float().permute(0, 2, 3, 1).numpy() - expected).max() < tolerance


def test_the_mean_image_is_not_flipped() -> None:
    """A mean image belongs to positions in the crop, not in the source, so a flipped image has the same mean image."""
    mean = np.zeros((100, 100, 3), np.float32)
    mean[:, 0] = 50
    image = Image.fromarray(random_image(200, 200))
    for flip in (False, True):
        place = (0, 0, 200, 200), flip, np.zeros(3, np.float32), (100, 100), NO_LIGHT
        with_mean = reference.apply(image, *place, normalize.Normalization.of(mean))
        without = reference.apply(image, *place, ZERO)
        assert np.allclose(without - with_mean, mean)


def test_a_mean_image_is_resized_with_the_crop() -> None:
    ramp = np.broadcast_to(np.linspace(0, 200, 224)[:, None, None], (224, 224, 3))
    half = normalize.Normalization.of(ramp).at(112).mean
    assert half.shape == (112, 112, 3)
    assert np.allclose(half, ramp.reshape(112, 2, 224, 3)[:, :, ::2].mean(axis=1), atol=0.5)
    assert normalize.Normalization.of([1, 2, 3]).at(112).mean.tolist() == [1, 2, 3]
    assert np.allclose(normalize.Normalization.of(ramp).per_channel().mean, 100, atol=0.01)
    assert normalize.Normalization.of([1, 2, 3]).per_channel().mean.tolist() == [1, 2, 3]
