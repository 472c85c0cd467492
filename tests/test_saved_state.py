"""Results that outlive a kill."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ssmprune_cli.errors import SsmpruneError, UsageError
from ssmprune_cli.workflows.trials.state import SavedState


def never() -> float:
    raise AssertionError("computed again")


def test_a_result_is_on_disk_as_soon_as_it_is_known_and_read_back(tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    state = SavedState(file, {"seed": 0})
    assert state.get("a", lambda: 1.5) == 1.5
    assert state.get("a", never) == 1.5
    again = SavedState(file, {"seed": 0})
    assert (again.found, again.get("a", never)) == (1, 1.5)
    assert [each.name for each in tmp_path.iterdir()] == ["state.json"], "no temporary file is left"
    again.remove()
    assert not file.exists()


def test_without_a_path_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    state = SavedState(None, {})
    assert state.get("a", lambda: 1.0) == 1.0 and state.get("a", never) == 1.0
    state.remove()
    assert list(tmp_path.iterdir()) == []


def test_the_state_of_another_run_is_refused_by_what_differs(tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    SavedState(file, {"seed": 0, "images": "x"}).get("a", lambda: 1)
    with pytest.raises(UsageError, match=r"state\.json.*seed differ"):
        SavedState(file, {"seed": 1, "images": "x"})
    assert json.loads(file.read_text())["results"] == {"a": 1}, "and left as it is"


def test_what_json_writes_otherwise_is_the_same_identity(tmp_path: Path) -> None:
    SavedState(tmp_path / "s.json", {"size": (32, 32), "more": {"mean": (0.5,)}}).get("a", lambda: 1)
    assert SavedState(tmp_path / "s.json", {"size": (32, 32), "more": {"mean": (0.5,)}}).found == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"identity": {}}',
        "\x00",
        '{"identity": [], "results": {}}',
        '{"identity": "seed", "results": {}}',
        '{"identity": {}, "results": [1]}',
        '{"identity": null, "results": null}',
        "[" * 100_000,
        "9" * 5000,
    ],
)
def test_a_damaged_state_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "state.json"
    file.write_text(text)
    with pytest.raises(SsmpruneError, match=r"state\.json: cannot be read as the state(.|\n)*--state"):
        SavedState(file, {"seed": 0})


def test_a_state_that_is_a_folder_or_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(SsmpruneError, match="not a file"):
            SavedState(path, {})
