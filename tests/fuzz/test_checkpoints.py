"""A few of the cases that `python -m tests.fuzz` makes without end."""

from __future__ import annotations

from pathlib import Path

from tests.fuzz.run import fuzz


def test_mutated_files_are_read_or_refused(tmp_path: Path) -> None:
    outcome = fuzz(tmp_path, range(150))
    assert not outcome.broken, str(outcome)
    assert sum(outcome.counts.values()) == 150
    assert sum(count for name, count in outcome.counts.items() if name.endswith("refused")) > 75
