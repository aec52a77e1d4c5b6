"""RUN/metrics.csv: one row per log interval and per validation; cells that a row has no figure for stay empty."""

from __future__ import annotations

import csv
import os
from pathlib import Path

COLUMNS = (
    "step", "epoch", "seconds", "lr", "train_loss", "images_per_s", "wait_share", "val_top1", "val_top5",
)  # fmt: skip


class MetricsFile:
    """Appends rows. Opened at step n it first drops rows after n, which a killed run wrote beyond its last checkpoint."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        rows = [row for row in read_metrics(path) if int(row["step"]) <= step] if path.exists() else []
        temporary = path.with_name(path.name + ".partial")
        with temporary.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, path)

    def write(self, row: dict[str, float]) -> None:
        with self.path.open("a", newline="") as stream:
            csv.DictWriter(stream, COLUMNS).writerow(row)


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Rows as text; a last line that a kill cut short is left out."""
    with path.open(newline="") as stream:
        return [row for row in csv.DictReader(stream) if row["step"] and None not in row.values()]
