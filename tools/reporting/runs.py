"""Reads and summarizes runs of train.py, finished or still training: config.json and metrics.csv."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from model.checkpoints import run_weights
from pipeline.errors import UserError
from training.metrics import COLUMNS, read_metrics

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Run:
    """A run's folder.

    name: the folder's, with parents if several runs have the same. config: the content of config.json. columns: those of
    metrics.csv, float64 (rows,) each, nan where a row has no value.
    """

    folder: Path
    name: str
    config: dict[str, Any]
    columns: dict[str, Floats]

    def argument(self, name: str) -> Any:
        """The value of one of train.py's options, None if unknown."""
        return (self.config.get("arguments") or {}).get(name)

    def series(self, x: str, y: str) -> tuple[Floats, Floats]:
        """Two columns, without rows in which either is not finite."""
        both = np.isfinite(self.columns[x]) & np.isfinite(self.columns[y])
        return self.columns[x][both], self.columns[y][both]

    @property
    def weights(self) -> Path | None:
        """The final weights; before there are any, those of the best checkpoint, or else of the last."""
        return run_weights(self.folder, ("best", "last"))


@dataclass(frozen=True)
class Summary:
    """A run's figures, each None until there is one.

    epochs, seconds: up to the last row. top1, top5: of the last validation, 0..1. best, best_epoch: the best top-1, and when.
    images_per_s: median over the rows. wait_share: data wait as a share of the whole time.
    """

    epochs: float | None
    seconds: float | None
    top1: float | None
    top5: float | None
    best: float | None
    best_epoch: float | None
    images_per_s: float | None
    wait_share: float | None


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in the given order, without duplicates. Raises UserError for a folder that is not a run."""
    places = list(dict.fromkeys(folder.resolve() for folder in folders))  # runs/latest links to one of the others
    return [read_run(place, name) for place, name in zip(places, _names(places), strict=True)]


def read_run(folder: Path, name: str) -> Run:
    config, metrics = folder / "config.json", folder / "metrics.csv"
    if not config.is_file() or not metrics.is_file():
        raise UserError(f"{folder}: no run there (no config.json and metrics.csv)", "give the --output folder of a train.py run")
    try:
        content = json.loads(config.read_text("utf-8"))
        if not isinstance(content, dict) or not isinstance(content.get("arguments", {}), dict):
            raise ValueError("it has no object of options")
    except (OSError, ValueError) as error:
        raise UserError(f"{config}: is damaged ({error})", "give another run") from error
    try:
        rows = read_metrics(metrics)
        columns = {name: np.array([float(row.get(name) or "nan") for row in rows], np.float64) for name in COLUMNS}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{metrics}: is damaged ({error})", "give another run") from error
    return Run(folder, name, content, columns)


def _names(places: Sequence[Path]) -> list[str]:
    """For each folder the shortest end of its path that no other folder has."""
    names = []
    for place in places:
        lengths = range(1, len(place.parts))
        tails = (place.parts[-length:] for length in lengths)
        alone = (tail for tail in tails if sum(other.parts[-len(tail) :] == tail for other in places) == 1)
        names.append("/".join(next(alone, place.parts)))
    return names


def summary(run: Run) -> Summary:
    epochs, top1 = run.series("epoch", "val_top1")
    best = int(np.argmax(top1)) if len(top1) else None
    weights, waits = time_weights(run), run.columns["wait_share"]
    known = np.isfinite(waits) & np.isfinite(weights)
    return Summary(
        epochs=_last(run.columns["epoch"]),
        seconds=_last(run.columns["seconds"]),
        top1=_last(top1),
        top5=_last(run.series("epoch", "val_top5")[1]),
        best=None if best is None else float(top1[best]),
        best_epoch=None if best is None else float(epochs[best]),
        images_per_s=float(np.nanmedian(run.columns["images_per_s"])) if known.any() else None,
        wait_share=float(np.average(waits[known], weights=weights[known])) if known.any() else None,
    )


def time_weights(run: Run) -> Floats:
    """For each row the time of its steps, up to a common factor: rows cover equally many images (the first of an epoch may cover
    fewer)."""
    with np.errstate(divide="ignore"):
        return 1 / run.columns["images_per_s"]


def _last(values: Floats) -> float | None:
    return float(values[-1]) if len(values) else None
