"""recipes/bench/tables.py: what a script prints is what its CSV file holds."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tables

NUMBERS = st.decimals(-1000, 1000, places=2).map(str)
PLAIN = st.one_of(NUMBERS, st.sampled_from(["", "did not run", "81 %", "0.7 (0.75)", "a, b", "clip/drop/none"]))
COLUMNS = st.sampled_from(
    [
        PLAIN,
        st.one_of(PLAIN, st.tuples(NUMBERS, NUMBERS, NUMBERS).map(lambda each: "{} ({} to {})".format(*each))),
        st.one_of(PLAIN, st.tuples(NUMBERS, NUMBERS).map(lambda each: "{} ± {}".format(*each))),
        st.one_of(PLAIN, st.tuples(NUMBERS, st.integers(0, 9)).map(lambda each: "{} ({}.25x)".format(*each))),
    ]
)


@given(st.lists(COLUMNS, min_size=1, max_size=4).flatmap(lambda kinds: st.lists(st.tuples(*kinds), min_size=1)))
def test_reading_gives_what_was_written(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, ...]]) -> None:
    path = tmp_path_factory.getbasetemp() / "table.csv"
    table = tables.Table(tuple(f"title {place}" for place in range(len(rows[0]))), rows, {"command": "python a: b"})
    tables.write(path, table)
    assert tables.read(path) == table


def test_measured_cells_are_split_for_programs(tmp_path: Path) -> None:
    rows: list[tuple[str, ...]] = [
        ("dense", "6.3 (6.0 to 6.4)", "0.2 ± 0.1", "317 (1.10x)"),
        ("slow", "did not run", "", "5"),
    ]
    tables.write(tmp_path / "table.csv", tables.Table(("way", "ms", "nats", "images/s"), rows))
    titles, first, second = csv.reader((tmp_path / "table.csv").read_text(encoding="utf-8").splitlines())
    assert titles == ["way", "ms", "ms [low]", "ms [high]", "nats", "nats [±]", "images/s", "images/s [times]"]
    assert first == ["dense", "6.3", "6.0", "6.4", "0.2", "0.1", "317", "1.10x"]
    assert second == ["slow", "did not run", "", "", "", "", "5", ""]


def test_a_script_prints_its_tables_and_writes_them_after_every_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tables.Tables(tmp_path / "speed.csv")
    run.start("scan", "shape", "ms")
    run.row("Vim-T", "0.18 (0.17 to 0.18)")
    assert tables.read(tmp_path / "speed_scan.csv").rows == [("Vim-T", "0.18 (0.17 to 0.18)")]
    run.start("ops", "op", "ms")
    run.row("gate", "0.26")
    run.measured_on("a machine, 2 cores")
    assert capsys.readouterr().out == (
        "\n| shape | ms |\n| --- | --- |\n| Vim-T | 0.18 (0.17 to 0.18) |\n"
        "\n| op | ms |\n| --- | --- |\n| gate | 0.26 |\n\na machine, 2 cores\n"
    )
    for name in ("scan", "ops"):
        about = tables.read(tmp_path / f"speed_{name}.csv").about
        assert about["machine"] == "a machine, 2 cores" and about["command"].startswith("python ")


def test_a_script_of_one_table_writes_the_file_itself_and_without_a_file_nothing(tmp_path: Path) -> None:
    run = tables.Tables(tmp_path / "training.csv")
    run.start("", "step")
    run.row("dense")
    assert tables.read(tmp_path / "training.csv").rows == [("dense",)]
    quiet = tables.Tables(None)
    quiet.start("scan", "step")
    quiet.row("dense")
    assert [path.name for path in tmp_path.iterdir()] == ["training.csv"]


def test_select_takes_rows_and_columns() -> None:
    table = tables.Table(("keep", "method", "nats"), [("0.9", "drop", "1"), ("0.5", "drop", "2"), ("0.5", "pool", "3")])
    chosen = table.select(["method", "nats"], {"keep": ["0.5"]})
    assert (chosen.titles, chosen.rows) == (("method", "nats"), [("drop", "2"), ("pool", "3")])
    with pytest.raises(KeyError, match="budget"):
        table.select(["budget"])
