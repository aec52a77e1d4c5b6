"""tools/bench/record_run.py: the rows of an evaluation. tests/test_train.py and tests/tools/test_evaluate.py record runs."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from tools.bench import record_run

EVALUATION: dict[str, Any] = {
    "top1": 0.75, "top5": 0.96, "images": 100,
    "schemes": {"centre": {"top1": 0.75, "top5": 0.96}, "ten-crop": {"top1": 0.77, "top5": 0.97}},
    "members": [
        {"name": "runs/r18", "schemes": {"centre": {"top1": 0.7, "top5": 0.95}, "ten-crop": {"top1": 0.71, "top5": 0.94}}},
        {"name": "runs/r34", "schemes": {"centre": {"top1": 0.72, "top5": 0.9}, "ten-crop": {"top1": 0.73, "top5": 0.91}}},
    ],
    "name": "all, averaged", "command": ["tools/evaluate.py", "runs/r18", "runs/r34"], "data": "shards", "split": "val",
    "precision": "bf16",
}  # fmt: skip


def recorded(monkeypatch: pytest.MonkeyPatch, folder: Path, content: dict[str, Any]) -> list[dict[str, str]]:
    (folder / "f.json").write_text(json.dumps(content))
    words = ["record_run.py", "--evaluation", str(folder / "f.json"), "--results", str(folder / "rows.csv")]
    monkeypatch.setattr(sys, "argv", words)
    record_run.main()
    with (folder / "rows.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_an_ensembles_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = recorded(monkeypatch, tmp_path, EVALUATION)
    names = ["runs/r18", "runs/r34", "all, averaged"]
    expected = [(scheme, name, metric) for name in names for scheme in ("centre", "ten-crop") for metric in ("top1", "top5")]
    assert [(row["benchmark"], row["spec"], row["metric"]) for row in rows] == [
        (scheme, f"{name}, shards, val, precision bf16", metric) for scheme, name, metric in expected
    ]
    assert [row["value"] for row in rows] == [
        "0.7",
        "0.95",
        "0.71",
        "0.94",
        "0.72",
        "0.9",
        "0.73",
        "0.91",
        "0.75",
        "0.96",
        "0.77",
        "0.97",
    ]
    for row in rows:
        assert (row["engine"], row["cache"], row["repeats"]) == ("evaluate.py", "warm", "1")
        assert row["command"] == "python tools/evaluate.py runs/r18 runs/r34"


def test_one_models_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    content = {key: value for key, value in EVALUATION.items() if key != "members"} | {"name": "r18.npz", "data": None}
    rows = recorded(monkeypatch, tmp_path, content)
    assert [row["spec"] for row in rows] == ["r18.npz, saved predictions, val, precision bf16"] * 4


def test_bad_input_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lacks command, name"):
        recorded(monkeypatch, tmp_path, {key: EVALUATION[key] for key in ("schemes", "data", "split", "precision")})
    for words in ([], ["RUN", "--evaluation", "FILE"]):
        monkeypatch.setattr(sys, "argv", ["record_run.py", *words])
        with pytest.raises(UserError, match="give either RUN or --evaluation"):
            record_run.main()
