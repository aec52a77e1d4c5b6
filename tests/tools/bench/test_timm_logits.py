"""The loader's images against those of timm's transforms, recorded by tools/bench/timm_logits.py where timm is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tools.bench.recording import RESULTS
from tools.bench.timm_logits import ARCHS, LIMIT, SHAPES, compare, linear_scores, loaded, make_data

pytestmark = pytest.mark.usefixtures("one_core")
RECORDED: dict[str, Any] = json.loads((RESULTS / "timm_logits.json").read_text())["archs"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], Path]:
    return make_data(tmp_path_factory.mktemp("timm"))


def test_the_recorded_logits_agree_with_timms() -> None:
    assert list(RECORDED) == list(ARCHS)
    assert {one["cfg"]["interpolation"] for one in RECORDED.values()} == {"bilinear", "bicubic"}
    assert {one["cfg"]["crop_mode"] for one in RECORDED.values()} == {"center", "squash"}
    assert max(one["difference"] for one in RECORDED.values()) <= LIMIT
    assert max(one["relative"] for one in RECORDED.values()) <= 2 * LIMIT


@pytest.mark.parametrize("arch", ARCHS)
def test_a_linear_classifier_scores_the_loaders_images_as_timms(arch: str, data: tuple[list[Path], Path]) -> None:
    cfg, expected = RECORDED[arch]["cfg"], np.array(RECORDED[arch]["scores"])
    assert expected.shape[0] == len(SHAPES)
    assert expected.std() > 0.3
    limit = 0.007 / cfg["std"][1]  # a fifth of the pixels may differ by one of 255
    assert np.abs(linear_scores(loaded(data[1], cfg)) - expected).max() <= limit
    other = cfg | {"interpolation": "bilinear" if cfg["interpolation"] == "bicubic" else "bicubic"}
    assert np.abs(linear_scores(loaded(data[1], other)) - expected).max() > limit


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_logits_agree_with_timms_where_timm_is_installed(arch: str, data: tuple[list[Path], Path]) -> None:
    pytest.importorskip("timm")
    assert compare(arch, *data)["difference"] <= LIMIT
