"""Small files, written whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ssmprune_cli.errors import SsmpruneError
from ssmprune_cli.workflows.write import write_text


def test_what_a_killed_process_left_is_removed_and_no_more(tmp_path: Path) -> None:
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    stale = tmp_path / f".a.json.{int(gone.stdout)}.tmp"
    mine = [tmp_path / name for name in (f".a.json.{os.getppid()}.tmp", ".a.json.notes.tmp", ".b.json.1.tmp", "c.tmp")]
    for path in (stale, *mine):
        path.touch()
    write_text(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "new"
    assert sorted(tmp_path.iterdir()) == sorted([*mine, tmp_path / "a.json"])


def test_bytes_of_names_that_are_no_utf8_are_escapes(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", os.fsdecode(b"caf\xe9"))
    assert (tmp_path / "a.txt").read_bytes() == b"caf\\udce9"


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(SsmpruneError, match="nowhere"):
        write_text(tmp_path / "nowhere" / "a.txt", "")
