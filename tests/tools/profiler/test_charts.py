"""The profile's charts: their content, and that their texts do not overlap."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image

from tests.tools.profiler.profiles import EXAMPLES, Profile, far_apart, input_bound, no_demand, on_a_gpu
from tools.profiler import charts


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES)
def test_no_texts_of_the_charts_overlap(example: Callable[[], Profile], monkeypatch: pytest.MonkeyPatch) -> None:
    profile = example()
    before = copy.deepcopy(profile)
    drawn = charts.figures(profile)
    assert sorted(drawn) == ["stages", "threads", *(["timeline"] if profile["demand"] else [])]
    assert profile == before
    for name, figure in drawn.items():
        boxes = texts(figure, monkeypatch)
        assert len(boxes) >= 5
        page = figure.bbox
        outside = [text for text, box in boxes if not (page.contains(*box.min) and page.contains(*box.max))]
        assert outside == [], name
        # One pixel of each box is an empty margin above and below the letters.
        overlap = [(one, other) for (one, a), (other, b) in itertools.combinations(boxes, 2) if a.padded(-0.5).overlaps(b)]
        assert overlap == [], name


@pytest.mark.parametrize("example", [input_bound, no_demand, far_apart])
def test_charts_are_png_files(example: Callable[[], Profile]) -> None:
    pngs = charts.draw(example())
    assert len(pngs) == (3 if example()["demand"] else 2)
    for png in pngs.values():
        with Image.open(io.BytesIO(png)) as image:
            image.load()
            assert image.format == "PNG"
            assert image.width == 1400
            assert 350 <= image.height <= 1400
            assert len(np.unique(np.asarray(image.convert("L")))) > 20  # not blank


def texts(figure: Figure, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Bbox]]:
    """Every text that is drawn, with its bounding box in pixels. Ticks outside an axis exist as texts, but are not drawn."""
    drawn: list[Text] = []
    draw = Text.draw

    def noted(text: Text, renderer: Any) -> None:
        if text.get_visible() and text.get_text().strip():
            drawn.append(text)
        draw(text, renderer)

    with monkeypatch.context() as patch:
        patch.setattr(Text, "draw", noted)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    return [(text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in drawn]


def rectangles(figure: Figure) -> list[Rectangle]:
    return [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]


def test_waterfall_adds_up_used_stages() -> None:
    """Each bar begins at the end of the last used one. The whole loader's bar is 1 / its speed."""
    profile = input_bound()
    bars = [(bar.get_x(), bar.get_width(), bool(bar.get_hatch())) for bar in rectangles(charts.stages(profile))]
    reached = 0.0
    for stage, (start, width, hatched) in zip(profile["stages"], bars[:-1], strict=True):
        assert start == pytest.approx(reached)
        assert hatched != stage["used"]
        assert width == pytest.approx(stage["at"][0]["ms_per_image"], abs=0.003)
        reached += stage["at"][0]["ms_per_image"] if stage["used"] else 0.0
    assert bars[-1][:2] == pytest.approx((0.0, 1e3 / 2_038.4))


def test_timeline_shows_the_whole_window_to_scale() -> None:
    profile = input_bound()
    waited = sum(step["got"] - step["asked"] for step in profile["demand"]["steps"])
    computed = sum(step["done"] - step["got"] for step in profile["demand"]["steps"])
    drawn = {"waiting": 0.0, "computing": 0.0}
    for bar in rectangles(charts.timeline(profile)):
        red, _, blue, _ = to_rgba(bar.get_facecolor())
        drawn["waiting" if red > blue else "computing"] += bar.get_width()
    assert drawn == pytest.approx({"waiting": waited, "computing": computed})


def test_best_prefetch_of_each_thread_count_is_drawn() -> None:
    best = charts.best_loaders(input_bound())
    assert list(best) == ["cpu"]  # ffcv failed
    assert [(point["threads"], point["prefetch"]) for point in best["cpu"]] == [(1, 8), (2, 8)]
    assert next(iter(charts.best_loaders(on_a_gpu()))) == "dali"
