"""recipes/bench/gpu.py on a machine without a GPU: every table, with a stand-in for its clock, and what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import gpu
import tables
from gpu_clock import Clock, Plan, Report, Row, Run, cell
from gpu_models import WAYS, Bench
from ssmprune_cli.models.mamba.vim import Vim, VimConfig
from ssmprune_cli.models.plainmamba.model import PlainMamba, PlainMambaConfig


class Counted(Clock):
    """Says that every call takes a millisecond, and that a graph is what it records."""

    device, scans = "cpu", "chunked"

    def milliseconds(self, run: Run, calls: int) -> float:
        run()
        return 1.0

    def graphed(self, run: Run) -> Run:
        run()
        return run

    def launches(self, run: Run) -> int:
        run()
        return 7

    def forget(self) -> None: ...


def vim() -> Vim:
    return Vim(VimConfig((16, 16), 8, 8, embed_dim=8, depth=2, num_classes=3))


def plain() -> PlainMamba:
    return PlainMamba(PlainMambaConfig((16, 16), 8, embed_dim=8, depth=2, num_classes=3))


TINY = gpu.Sizes(
    vims={"Vim": vim},
    widths={"Vim": 8},
    others={"PlainMamba": plain},
    batches=(2,),
    family_batches=(1, 2),
    tokens=5,
    scans={"short": (1, 5, 4)},
    backward={"short": (1, 5, 4)},
    splits={"short": (1, 5, 4)},
    parts=(2, 8),
    copy=64,
)


def test_every_table_is_measured_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(tmp_path / "gpu.csv", minutes=5)
    gpu.measure(Bench(Counted(), report, seconds=0, dtype=torch.float32), TINY)
    assert not report.failures
    written = {path.stem.removeprefix("gpu_"): tables.read(path) for path in tmp_path.glob("*.csv")}
    assert set(written) == {
        *("models", "prune_point", "launches", "agreement", "scan", "scan_backward", "families", "splits")
    }
    models = written["models"]
    assert [row[1] for row in models.rows] == list(WAYS)
    # Each takes a millisecond a batch of 2: none is faster; 2 x 5 tokens against 5 + 3.
    assert models.rows[1][2:] == ("1.000 (1.000 to 1.000)",) * 2 + ("2000", "1.00x", "1.25x", "80%")
    assert written["prune_point"].rows[0][-2:] == ("7", "7") and len(written["prune_point"].rows) == 2
    assert [row[1] for row in written["launches"].rows] == ["3.5"] * 3
    assert written["families"].rows[1][1:] == ("half, after block 1", "1000", "2000")
    assert written["splits"].rows[0][0] == "short, float32" and written["splits"].rows[0][-1] == ""
    assert float(written["agreement"].rows[0][1]) < 1e-5
    assert "Not measured" not in capsys.readouterr().out


def test_what_the_time_runs_out_for_is_named_and_a_row_that_fails_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = Report(tmp_path / "gpu.csv", minutes=5)

    def fail() -> list[list[str]]:
        raise RuntimeError("CUDA out of memory")

    def last() -> list[list[str]]:
        report._deadline = 0
        return [["last", "1.000"]]

    rows = [Row("first", fail), Row("second", last), Row("third", last)]
    report.carry_out([Plan("one", ("row", "ms"), rows), Plan("two", ("row", "ms"), rows[:1])])
    out = capsys.readouterr().out
    assert report.failures == ["one (first) failed: RuntimeError: CUDA out of memory"]
    assert "Not measured for want of time: one (third), two (first)." in out
    assert tables.read(tmp_path / "gpu_one.csv").rows == [("last", "1.000")]
    assert not (tmp_path / "gpu_two.csv").exists()
    assert "Not measured" in (tmp_path / "gpu.log").read_text()


@pytest.mark.parametrize(
    ("body", "seconds", "said"),
    [
        ("assert True", 60, "1 passed"),
        ("assert 1 == 2", 60, "1 failed"),
        ("import time; time.sleep(60)", 0.1, "took more"),
    ],
)
def test_the_tests_come_first_and_say_how_they_ended(
    body: str, seconds: float, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "test_it.py").write_text(f"def test_it():\n    {body}\n")
    report = Report(tmp_path / "gpu.csv", minutes=5)
    gpu.run_tests(report, [str(tmp_path / "test_it.py"), "tests/not_there.py"], seconds)
    assert said in capsys.readouterr().out and bool(report.failures) == (said != "1 passed")
    assert ("1 == 2" in (tmp_path / "gpu.log").read_text()) == (said == "1 failed")


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu.py"])
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        gpu.main()


def test_files_that_it_names_are_there_and_models_can_be_made() -> None:
    assert any((gpu.ROOT / each).exists() for each in gpu.TESTS)
    for make in (*gpu.FULL.vims.values(), *gpu.FULL.others.values()):
        with torch.device("meta"):
            assert make().stages


def test_a_cell() -> None:
    assert cell([1.0, 2.0, 3.0]) == "2.000 (1.500 to 2.500)" and cell(None) == "did not run"
