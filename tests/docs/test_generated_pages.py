"""What commands write into the documentation is what they write now, and its figures are those of the files."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

import commands
import drawings
import results
import tables

ROOT = Path(__file__).parents[2]
FILES = sorted(results.RESULTS.glob("*.csv"))


def test_the_page_of_commands_is_what_the_command_writes() -> None:
    assert commands.PAGE.read_text(encoding="utf-8") == commands.page(), "run `python recipes/docs/commands.py`"


@pytest.mark.parametrize("name", drawings.DRAWINGS)
def test_drawings_are_what_the_command_draws(name: str) -> None:
    drawn = (drawings.FOLDER / f"{name}.svg").read_text(encoding="utf-8")
    assert drawn == drawings.DRAWINGS[name]().svg(), "run `python recipes/docs/drawings.py`"
    assert "prefers-color-scheme: dark" in drawn


@pytest.mark.parametrize("page", results.pages(), ids=lambda page: page.name)
def test_tables_in_pages_are_those_of_the_files(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert results.filled(text) == text, "run `python recipes/bench/results.py`"


@pytest.mark.parametrize("name", results.PLOTS)
def test_plots_are_those_of_the_files(name: str) -> None:
    drawn = (drawings.FOLDER / f"{name}.svg").read_text(encoding="utf-8")
    assert drawn == results.PLOTS[name](results.RESULTS / f"{name}.csv"), "run `python recipes/bench/results.py`"


def test_a_page_with_another_figure_is_noticed() -> None:
    page = ROOT / "docs" / "results.md"
    text = page.read_text(encoding="utf-8")
    assert "56.60 (56.14 to 57.26)" in text
    assert results.filled(text.replace("56.60 (56.14 to 57.26)", "50.00 (49.00 to 51.00)")) == text


@pytest.mark.parametrize(
    "marker", ["speed_pruned; columns: no such", "speed_pruned; where: keep, reduction = 0.1", "speed_pruned; rows: 3"]
)
def test_a_marker_that_no_row_or_column_fits_is_refused(marker: str) -> None:
    with pytest.raises(KeyError):
        results.filled(f"<!-- table: {marker} -->\n<!-- end -->\n")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_says_where_it_comes_from_and_is_rectangular(path: Path, tmp_path: Path) -> None:
    table = tables.read(path)
    assert {"command", "date", "machine"} <= set(table.about)
    assert table.rows and len(set(table.titles)) == len(table.titles)
    rows = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("# ")]
    assert len({len(row) for row in csv.reader(rows)}) == 1
    tables.write(tmp_path / "again.csv", table)
    assert (tmp_path / "again.csv").read_text(encoding="utf-8") == path.read_text(encoding="utf-8")


def test_figures_of_the_readme_are_in_the_files_that_it_names() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("|") and ".csv`" in line]
    assert len(rows) == 5
    for row in rows:
        what, dense, pruned, change, source = (cell.strip() for cell in row.strip("|").split(" | "))
        (name,) = re.findall(r"`(\w+)\.csv`", source)
        cells = {cell for line in tables.read(results.RESULTS / f"{name}.csv").rows for cell in line}
        for figure in re.findall(r"[\d.]+(?: \([\d.]+ to [\d.]+\)| ± [\d.]+)?", f"{dense} {pruned}"):
            assert figure in cells, f"{what}: {figure} is not in {name}.csv"
        if change.endswith("x") or "±" in change:
            assert change.removesuffix(" points") in cells, f"{what}: {change} is not in {name}.csv"
