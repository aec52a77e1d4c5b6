"""tools/bench/tables.py: which rows the tables show, and the files that hold them."""

from __future__ import annotations

import csv
import re
import shutil
from pathlib import Path

import pytest

from pipeline.errors import UserError
from tests.helpers import ROOT
from tools.bench import tables
from tools.bench.recording import RESULTS

BEGIN = "<!-- table: {} -->"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A copy of the recorded rows, to which a test may append."""
    return Path(shutil.copytree(RESULTS, tmp_path / "results"))


def append(file: Path, copied: dict[str, str], date: str = "2030-01-01", **changed: str) -> None:
    """Append the rows with the columns `copied` again, as a later run with `changed` columns."""
    with file.open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if all(copied[name] in row[name] for name in copied)]
    assert rows
    with file.open("a", newline="") as stream:
        csv.DictWriter(stream, list(rows[0])).writerows(row | {"date": date, "commit": "abcdef0"} | changed for row in rows)


def write_readme(root: Path, *names: str) -> Path:
    file = root / "README.md"
    file.write_text("".join(f"# {name}\n\n{BEGIN.format(name)}\n{tables.END}\n\nAfter.\n" for name in names))
    return file


@pytest.mark.parametrize("name", tables.TABLES)
def test_every_table_has_lines_of_equal_length_and_an_origin(name: str) -> None:
    *lines, blank, origin = tables.TABLES[name](RESULTS)
    assert len({line.count("|") for line in lines}) == 1
    assert len(lines) > 2
    assert blank == ""
    assert re.search(r"Measured: \d{4}-\d\d-\d\d, commit [0-9a-f]{7}.*, \d+ cores? of .*, page cache \w+", origin)


def test_the_newest_run_counts(results: Path) -> None:
    before = tables.regions(results)
    append(results / "region.csv", {"commit": "fc52365", "benchmark": "decode whole"}, "2020-01-01", value="7.77")
    assert tables.regions(results) == before  # an older run, though it stands below
    append(results / "region.csv", {"commit": "fc52365", "benchmark": "decode whole"}, value="9.99")
    after = tables.regions(results)
    assert "| decode the whole image, ms | 9.99 | 9.99 | 9.99 |" in after
    assert "2030-01-01, commit abcdef0, 1 core of" in after[-1]


def test_a_comparison_with_fewer_loaders_does_not_replace_a_full_one(results: Path) -> None:
    before = tables.comparison(results)
    file = results / "compare.csv"
    append(file, {"spec": "uint8", "engine": "cropfeed-cpu"}, value="1.0", command="compare.py --only cropfeed-cpu-lossless")
    assert tables.comparison(results) == before
    append(file, {"spec": "uint8", "metric": "images_per_s"}, value="12345", command="compare.py IMAGES")
    assert all(" 12,345 " in line for line in tables.comparison(results)[2:-2])


def test_bytes_on_disk_stand_beside_images_per_second(results: Path) -> None:
    file = results / "compare.csv"
    assert not any("kB" in line for line in tables.comparison(results))  # older rows have none
    append(file, {"spec": "uint8"}, command="again")
    append(
        file, {"spec": "uint8", "metric": "images_per_s", "date": "2030"}, command="again", metric="kb_per_image", value="111.4"
    )
    head, _, *lines = tables.comparison(results)[:-2]
    assert "kB on disk" in head
    assert all(line.count("×), 111 kB |") == len([cell for cell in line.split(" | ")[1:] if "×" in cell]) for line in lines)


def test_each_loader_has_its_newest_prediction(results: Path) -> None:
    *before, _, _ = tables.foreign(results)
    kept = {"benchmark": "foreign loader", "spec": "torch-pillow; ", "metric": "predicted_over_measured"}
    append(results / "profile.csv", kept, value="1.5")
    *after, _, _ = tables.foreign(results)
    assert [line for line in after if line not in before] == [
        re.sub(r"[\d.]+ \|$", "1.50 |", line) for line in before if "PyTorch DataLoader + Pillow" in line
    ]
    assert len(after) == len(before) > 4


def test_an_unknown_loader_is_shown_by_its_name(results: Path) -> None:
    append(results / "compare.csv", {"engine": "spdl"}, "2026-11-24", engine="new-loader", commit="fcf0eda+", command="again")
    append(results / "compare.csv", {"spec": "uint8"}, command="all")
    assert any(line.startswith("| new-loader | ") for line in tables.comparison(results))


def test_the_summary_has_the_fastest_pipeline_of_each_library(results: Path) -> None:
    def rates(name: str, column: int) -> list[float]:
        rows = [line.split(" | ") for line in tables.comparison(results)[2:-2]]
        return [float(row[column].split()[0].replace(",", "")) for row in rows if row[0].startswith(f"| {name}")]

    lines = tables.summary(results)[2:-2]
    assert len(lines) <= 8
    for name in ("DALI", "FFCV"):
        line = next(line for line in lines if line.startswith(f"| {name}")).split(" | ")
        assert [cell.split()[0] for cell in line[1:]] == [f"{max(rates(name, column)):,.0f}" for column in (1, 2)]


def test_a_training_with_fewer_seeds_does_not_replace_one_with_more(results: Path) -> None:
    before = tables.accuracy(results)
    for number, engine in enumerate(("cropfeed", "plain", "cropfeed / plain"), 100):
        kept = {"engine": engine, "spec": "seeds 2; 1 cores each; another of these runs, or tests"}
        append(results / "accuracy_runs.csv", kept, id=str(number), engine=engine)
    assert tables.accuracy(results) == before


def test_a_missed_goal_is_shown(results: Path) -> None:
    name = "throughput over the fastest other loader, lossless shards"
    assert any(line.startswith(f"| {name} | ≥ 3 ×") and line.endswith("| yes |") for line in tables.goals(results))
    append(results / "compare.csv", {"spec": "uint8"}, value="2.5", command="again")
    assert f"| {name} | ≥ 3 × | 2.50 × | **no** |" in tables.goals(results)


def test_files_are_updated_in_place_once(tmp_path: Path, results: Path) -> None:
    readme = write_readme(tmp_path, "summary", "goals")
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "benchmarks.md"
    page.write_text("A page without tables.\n")
    stale = ["README.md: summary", "README.md: goals"]
    empty = readme.read_text()
    assert tables.update(tmp_path, results, check=True) == stale
    assert readme.read_text() == empty
    assert tables.update(tmp_path, results) == stale
    assert tables.update(tmp_path, results) == []
    text = readme.read_text()
    expected = "\n".join(["# goals", "", BEGIN.format("goals"), "", *tables.goals(results), "", tables.END, "", "After.", ""])
    assert text.endswith(expected)
    assert page.read_text() == "A page without tables.\n"
    readme.write_text(text.replace("4,009", "5,009"))
    assert tables.update(tmp_path, results, check=True) == stale[:1]


def test_check_lists_stale_tables_and_exits_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_readme(tmp_path, "scale")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr("sys.argv", ["tables.py", "--check"])
    with pytest.raises(SystemExit, match="1"):
        tables.main()
    assert "README.md: scale: stale" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["tables.py"])
    tables.main()
    monkeypatch.setattr("sys.argv", ["tables.py", "--check"])
    tables.main()


def test_an_unknown_table_names_the_file_and_the_known_tables(tmp_path: Path) -> None:
    file = write_readme(tmp_path, "scale", "sumary")
    with pytest.raises(UserError, match=rf"{file}: unknown table sumary; known tables: summary, comparison, ") as raised:
        tables.update(tmp_path, RESULTS)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "text",
    [
        f"{BEGIN.format('scale')}\n",
        f"{BEGIN.format('scale')}\n{BEGIN.format('goals')}\n{tables.END}\n",
        f"  {BEGIN.format('scale')}\n{tables.END}\n",
        f"{BEGIN.format('scale')} {tables.END}\n",
    ],
    ids=["no end", "no end before the next", "indented", "one line"],
)
def test_incomplete_markers_are_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(UserError, match="a table's markers are incomplete"):
        tables.update(tmp_path, RESULTS)


def test_the_tables_of_the_repository_are_up_to_date() -> None:
    assert tables.update(ROOT, RESULTS, check=True) == [], "run python tools/bench/tables.py"
