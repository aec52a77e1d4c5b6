"""The fused kernel, in Triton's interpreter and compiled without a GPU, and what replaces it where it does not work."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from pipeline.loader import Loader
from pipeline.pixels import normalize
from pipeline.pixels.normalize import Normalization, Normalizer, normalize_on_device, normalize_tensor
from pipeline.spec import LoaderSpec
from tests.helpers import run_forked
from tests.with_triton import FOLDER

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# One value, less than a block of 1,024 values, several whole blocks, and a block with a rest
SHAPES = ((1, 1, 1), (3, 5, 7), (2, 32, 32), (2, 37, 41))
INSTALLED = importlib.util.find_spec("triton") is not None or FOLDER.exists()

needs_triton = pytest.mark.skipif(
    not INSTALLED and os.environ.get("CI") != "true", reason=f"Triton is not in {FOLDER}: sh tools/install.sh installs it"
)


def case(count: int, height: int, width: int, mean_image: bool, dtype: torch.dtype) -> tuple[Any, ...]:
    """Arguments of `normalize_tensor`."""
    random = torch.Generator().manual_seed(height)
    pixels = torch.randint(256, (count, height, width, 3), dtype=torch.uint8, generator=random)
    mean = 90 + 40 * torch.rand((height, width, 3) if mean_image else (3,), generator=random)
    return pixels, 9 * torch.randn(count, 3, generator=random), mean, 50 + 9 * torch.rand(3, generator=random), dtype


def special_cases() -> list[tuple[Any, ...]]:
    """Arrays that are not contiguous; values halfway between two of bfloat16, of both signs; infinity and NaN."""
    pixels, shift, mean, std, dtype = case(2, 9, 12, True, torch.float32)
    halves = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(-1, -1, -1, 3)
    nan = torch.tensor([[0, 0x7FFFFFFF, 0]], dtype=torch.int32).view(torch.float32)  # of GPUs: all bits but the sign are set
    by_0 = torch.zeros(3), torch.tensor([0.0, 1.0, 2.0])
    return [
        (pixels[:, ::2, 1::3], shift.flip(1).T.contiguous().T, mean[::2, 1::3], std, dtype),
        *((halves, torch.tensor([[0.5, -0.5, -255.5]]), torch.zeros(3), torch.ones(3), dtype) for dtype in DTYPES),
        *((halves, nan, *by_0, dtype) for dtype in DTYPES),
    ]


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two tensors are equal to the bit, but for the bits of NaN, in dtype and layout."""
    layout = found.dtype == expected.dtype and found.stride() == expected.stride()
    nans = torch.equal(found.isnan(), expected.isnan())
    return layout and nans and torch.equal(found.nan_to_num(), expected.nan_to_num())


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[tuple[Any, ...], torch.Tensor]]:
    """Cases with the kernel's results."""
    folder = tmp_path_factory.mktemp("interpreted")
    cases = [case(*shape, mean_image, dtype) for shape in SHAPES for mean_image in (False, True) for dtype in DTYPES]
    cases += special_cases()
    torch.save(cases, folder / "cases.pt")
    result = run_forked("tests/with_triton.py", folder, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr
    assert "Triton does not work" not in result.stderr
    return list(zip(cases, torch.load(folder / "results.pt"), strict=True))


@needs_triton
def test_the_kernel_equals_separate_operations_to_the_bit(interpreted: list[tuple[tuple[Any, ...], torch.Tensor]]) -> None:
    assert len(interpreted) == 31
    for arguments, found in interpreted:
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert same(found, normalize_tensor(*arguments)), [getattr(value, "shape", value) for value in arguments]


@needs_triton
def test_the_kernel_agrees_with_the_cpus_normalizer(interpreted: list[tuple[tuple[Any, ...], torch.Tensor]]) -> None:
    """Which multiplies by the rounded 1 / std: results differ by up to two units in the last place, with 16 bits by one."""
    for (pixels, shift, mean, std, dtype), found in interpreted[:-3]:  # without the divisions by 0
        normalizer = Normalizer(Normalization(mean.contiguous().numpy(), std.numpy()), pixels.shape[2])
        out = torch.empty(pixels.shape, dtype=dtype)
        stored = out if dtype == torch.float32 else out.view(torch.int16 if dtype == torch.float16 else torch.uint16)
        normalizer(np.ascontiguousarray(pixels), np.ascontiguousarray(shift), stored.numpy())
        last_place = torch.finfo(dtype).eps * (2 if dtype == torch.float32 else 1)
        assert torch.allclose(found.permute(0, 2, 3, 1), out, rtol=last_place, atol=1e-6)


@needs_triton
def test_the_kernel_compiles_for_gpus(tmp_path: Path) -> None:
    """The interpreter accepts code that the compiler refuses. Threads store 16 bytes at once."""
    torch.save([case(2, 16, 16, True, torch.bfloat16), case(2, 16, 16, False, torch.float32)], tmp_path / "cases.pt")
    result = run_forked("tests/with_triton.py", tmp_path, TRITON_CACHE_DIR=str(tmp_path / "cache"))
    assert result.returncode == 0, result.stderr
    store = "st.global.v4.b32"
    assert result.stdout.splitlines() == [f"{gpu} {stores}" for gpu in (80, 90) for stores in (store, f"{store} {store}")]


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    """Replaces `normalize_fused`, which TRITON_INTERPRET=1 calls on a CPU, too."""

    def replace(function: Callable[..., Any]) -> None:
        monkeypatch.setitem(sys.modules, "pipeline.pixels.fused", SimpleNamespace(normalize_fused=function))

    monkeypatch.setattr(normalize, "_fused_fails", False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return replace


def test_separate_operations_replace_a_kernel_that_does_not_compile_with_one_line_of_log(
    fused: Callable[[Callable[..., Any]], None], caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def fails(*arguments: Any) -> None:
        calls.append(arguments)
        raise RuntimeError("\nFailed to find C compiler.\nPlease specify one")

    fused(fails)
    arguments = case(2, 5, 7, True, torch.bfloat16)
    for _ in range(3):
        assert same(normalize_on_device(*arguments), normalize_tensor(*arguments))
    assert len(calls) == 1
    reason = "because Triton does not work: Failed to find C compiler."
    expected = f"lighting and normalization run slower, in several kernels, {reason}"
    assert caplog.record_tuples == [("cropfeed", logging.WARNING, expected)]


def test_separate_operations_replace_a_missing_triton_with_one_line_of_log(
    fused: Callable[[Callable[..., Any]], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "pipeline.pixels.fused", raising=False)
    arguments = case(2, 5, 7, False, torch.float16)
    for _ in range(2):
        assert same(normalize_on_device(*arguments), normalize_tensor(*arguments))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "triton" in caplog.messages[0].rpartition(":")[2]


def test_a_lack_of_memory_is_no_failure_of_the_kernel(fused: Callable[[Callable[..., Any]], None]) -> None:
    def fails(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    fused(fails)
    arguments = case(1, 5, 7, False, torch.float32)
    with pytest.raises(torch.OutOfMemoryError):
        normalize_on_device(*arguments)
    fused(lambda *_: "a smaller batch fits")
    assert normalize_on_device(*arguments) == "a smaller batch fits"


def test_a_cpu_does_not_try_the_kernel(
    fused: Callable[[Callable[..., Any]], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    fused(lambda *_: None)
    arguments = case(1, 5, 7, True, torch.float16)
    assert same(normalize_on_device(*arguments), normalize_tensor(*arguments))
    assert not caplog.records


def test_loaders_use_the_kernel_on_devices(fused: Callable[[Callable[..., Any]], None]) -> None:
    fused(lambda *arguments: [getattr(value, "shape", value) for value in arguments])
    loader = SimpleNamespace(
        spec=LoaderSpec("nowhere", dtype=torch.float16), lighting_basis=np.eye(3, dtype=np.float32), _on_device={},
        normalization_at=lambda size: Normalization.of(np.zeros((*size, 3))), _to_device=torch.from_numpy,
    )  # fmt: skip
    views = SimpleNamespace(shift=None, alphas=np.zeros((2, 3), np.float32))
    pixels = torch.empty(2, 5, 7, 3, dtype=torch.uint8, device="meta")
    expected = [(2, 5, 7, 3), (2, 3), (5, 7, 3), (3,), torch.float16]
    assert cast(Any, Loader._images)(loader, pixels, views) == expected


@pytest.mark.gpu
def test_the_kernel_on_a_gpu_equals_separate_operations_to_the_bit(caplog: pytest.LogCaptureFixture) -> None:
    cases = [case(*shape, mean_image, dtype) for shape in SHAPES for mean_image in (False, True) for dtype in DTYPES]
    for *tensors, dtype in cases + special_cases():
        arguments: list[Any] = [*(tensor.cuda() for tensor in tensors), dtype]
        assert same(normalize_on_device(*arguments), normalize_tensor(*arguments))
    assert not caplog.records
