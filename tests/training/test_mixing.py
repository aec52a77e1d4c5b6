from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp, kstest

from pipeline.errors import UserError
from pipeline.plan import sampling
from training.mixing import Mixing, mix_images, mixed_loss

PAIRS = 20_000


def random_images(count: int, height: int = 12, width: int = 10, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    images = torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(count))
    return images.to(dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.4, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_mixed_images_equal_those_of_a_plain_loop(mixup: float, cutmix: float) -> None:
    images = random_images(64)
    mixes = Mixing(mixup, cutmix, 7, 64).draw(3, 128, 192, (12, 10))
    mixed, share = mix_images(images, mixes)
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    kinds = set()
    for place in range(64):
        image, other = images[place].double().numpy(), images[place ^ 1].double().numpy()
        if mixes.opacity[place] == 1:
            top, left, bottom, right = mixes.boxes[place].astype(int)
            assert 0 <= top <= bottom <= 12
            assert 0 <= left <= right <= 10
            expected, own = image.copy(), 120 - (bottom - top) * (right - left)
            expected[:, top:bottom, left:right] = other[:, top:bottom, left:right]
            assert share[place].item() == pytest.approx(own / 120, abs=1e-6)
            kinds.add("cutmix")
        else:
            expected = float(share[place]) * image + (1 - float(share[place])) * other
            assert share[place] == share[place ^ 1]
            kinds.add("mixup")
        np.testing.assert_allclose(mixed[place].numpy(), expected, atol=1e-6)
    assert kinds == {name for name, alpha in (("mixup", mixup), ("cutmix", cutmix)) if alpha}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept_and_boxes_are_exact(dtype: torch.dtype) -> None:
    images = random_images(32, dtype=dtype)
    mixes = Mixing(0.0, 1.0, 0, 32).draw(0, 0, 32, (12, 10))
    mixed, share = mix_images(images, mixes)
    assert (mixed.dtype, share.dtype) == (dtype, torch.float32)
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    others = images[torch.arange(32) ^ 1]
    from_other = ((mixed == others) & (mixed != images)).any(1).sum((1, 2))
    torch.testing.assert_close(from_other / 120, 1 - share)
    assert bool(((mixed == others) | (mixed == images)).all())


def test_without_alphas_nothing_is_mixed() -> None:
    images = random_images(8)
    mixed, share = mix_images(images, Mixing(0.0, 0.0, 0, 8).draw(0, 0, 8, (12, 10)))
    assert torch.equal(mixed, images)
    assert torch.equal(share, torch.ones(8))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_cross_entropy_of_mixed_labels(smoothing: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(6, 5, generator=generator), torch.tensor([0, 3, 4, 4, 1, 2])
    share = torch.tensor([0.3, 0.3, 1.0, 1.0, 0.8, 0.8])
    expected = 0.0
    for place in range(6):
        scores = logits[place].double().numpy()
        logs = scores - np.log(np.exp(scores).sum())
        target = np.zeros(5)
        target[labels[place]] += float(share[place])
        target[labels[place ^ 1]] += 1 - float(share[place])
        target = (1 - smoothing) * target + smoothing / 5
        expected -= float((target * logs).sum()) / 6
    assert mixed_loss(logits, labels, share, smoothing).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("processes", "accumulate"), [(1, 1), (1, 4), (2, 1), (2, 2), (4, 1), (4, 2)])
def test_mixed_images_are_the_same_for_any_number_of_ranks_and_parts(processes: int, accumulate: int) -> None:
    """The loss is the same, too: the mean over all parts."""
    images, labels = random_images(32), torch.arange(32) % 7
    start, stop = 96, 128  # the fourth global batch of an epoch
    whole, share = mix_images(images, Mixing(0.2, 1.0, 5, 32).draw(9, start, stop, (12, 10)))
    weights = torch.randn(7, 360, generator=torch.Generator().manual_seed(2))
    expected = mixed_loss(whole.flatten(1) @ weights.T, labels, share, 0.1)
    mixing = Mixing(0.2, 1.0, 5, 32, processes, accumulate)
    found, losses = [], []
    for rank in range(processes):
        low, high = sampling.rank_range(start, stop, rank, processes)
        own = slice(low - start, high - start)
        mixed, shares = mix_images(images[own], mixing.draw(9, low, high, (12, 10)))
        found.append(mixed)
        for part in zip(*(tensor.chunk(accumulate) for tensor in (mixed, labels[own], shares)), strict=True):
            losses.append(mixed_loss(part[0].flatten(1) @ weights.T, part[1], part[2], 0.1))
    assert torch.equal(torch.cat(found), whole)
    torch.testing.assert_close(torch.stack(losses).mean(), expected)


def test_draws_depend_on_the_position_and_not_on_the_range() -> None:
    mixing = Mixing(0.3, 0.7, 11, 10)
    whole = mixing.draw(4, 0, 1000, (224, 160))
    for low, high in [*pairwise([0, 2, 10, 500, 998, 1000]), (6, 6)]:
        for part, column in zip(mixing.draw(4, low, high, (224, 160)), whole, strict=True):
            assert np.array_equal(part, column[low:high])
    for column in whole:
        assert np.array_equal(column[::2], column[1::2])  # the images of a pair share a draw
    others = mixing.draw(5, 0, 1000, (224, 160)), Mixing(0.3, 0.7, 12, 10).draw(4, 0, 1000, (224, 160))
    for other in others:
        assert np.mean(other.share[::2] == whole.share[::2]) < 0.05
        assert abs(np.corrcoef(other.share[::2], whole.share[::2])[0, 1]) < 0.2  # 500 pairs: 4.5 deviations
    with pytest.raises(ValueError, match="split a pair"):
        mixing.draw(0, 3, 8, (224, 160))


@pytest.mark.parametrize(
    ("alpha", "below"),
    [
        (1.0, lambda x: x),
        (0.5, lambda x: 2 / np.pi * np.arcsin(np.sqrt(x))),
        (2.0, lambda x: 3 * x**2 - 2 * x**3),
    ],
)
def test_mixups_shares_are_beta_distributed(alpha: float, below: object) -> None:
    shares = Mixing(alpha, 0.0, 1, 2).draw(0, 0, 2 * PAIRS, (224, 224)).share[::2]
    assert kstest(shares, below).pvalue > 1e-3
    assert abs(np.corrcoef(shares[1:], shares[:-1])[0, 1]) < 4.5 / PAIRS**0.5


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_cutmix_boxes_are_distributed_as_in_the_authors_code(alpha: float) -> None:
    """Compared with rand_bbox of clovaai/CutMix-PyTorch, on images so large that rounding does not matter."""
    size = 4096
    rng = np.random.default_rng(0)
    cut = (size * np.sqrt(1 - rng.beta(alpha, alpha, PAIRS))).astype(int)
    edges = []
    for _ in range(2):
        at = rng.integers(size, size=PAIRS)
        edges.append((np.clip(at - cut // 2, 0, size), np.clip(at + cut // 2, 0, size)))
    reference = 1 - (edges[0][1] - edges[0][0]) * (edges[1][1] - edges[1][0]) / size**2
    mixes = Mixing(0.0, alpha, 3, 2).draw(0, 0, 2 * PAIRS, (size, size))
    assert ks_2samp(mixes.share[::2], reference).pvalue > 1e-3
    for edge, expected in enumerate((edges[0][0], edges[1][0], edges[0][1], edges[1][1])):
        assert ks_2samp(mixes.boxes[::2, edge], expected).pvalue > 1e-3


def test_each_pair_uses_mixup_or_cutmix_with_equal_probability() -> None:
    mixes = Mixing(0.5, 1.0, 2, 2).draw(1, 0, 2 * PAIRS, (224, 224))
    is_cut = mixes.boxes[::2, 2] > 0
    assert abs(np.mean(is_cut) - 0.5) < 5 * 0.5 / PAIRS**0.5 + 0.01  # a few boxes are empty
    assert np.all(mixes.opacity[::2][is_cut] == 1)
    assert np.all(mixes.opacity[::2][~is_cut] == mixes.share[::2][~is_cut])
    assert kstest(mixes.share[::2][~is_cut & (mixes.opacity[::2] < 1)], lambda x: 2 / np.pi * np.arcsin(np.sqrt(x))).pvalue > 1e-3


def test_boxes_scale_with_the_image() -> None:
    """Progressive resizing changes the relative positions of boxes only by rounding."""
    mixing = Mixing(0.0, 1.0, 8, 2)
    small, large = mixing.draw(2, 0, 2000, (96, 128)), mixing.draw(2, 0, 2000, (224, 192))
    for edge, (side, longer) in enumerate([(96, 224), (128, 192)] * 2):
        difference = small.boxes[:, edge] / side - large.boxes[:, edge] / longer
        assert np.abs(difference).max() <= 0.5 / side + 0.5 / longer + 1e-6
    before, after = (Mixing(1.0, 0.0, 8, 2).draw(2, 0, 200, size).share for size in ((96, 128), (224, 192)))
    assert np.array_equal(before, after)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((1.0, 0.0, 0, 12, 4, 1), r"`batch_size` 12 must be a multiple of 2 x processes x `accumulate` \(8\)"),
        ((1.0, 0.0, 0, 12, 2, 2), "change `batch_size` or `accumulate`"),
        ((-0.1, 0.0, 0, 12, 1, 1), "`mixup` -0.1"),
        ((0.0, float("nan"), 0, 12, 1, 1), "`cutmix` nan"),
    ],
)
def test_invalid_settings_are_refused(given: tuple[float, float, int, int, int, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Mixing(*given)
