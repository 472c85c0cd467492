"""Small files, written whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ssmprune_cli.errors import SsmpruneError, UsageError
from ssmprune_cli.workflows.write import check_folder, check_place, write_text


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


@pytest.mark.parametrize("name", ["file/x", "file/a/x", "x" * 300, "a" * 300 + "/x", "/proc/x", "/proc/a/x"])
def test_a_place_is_probed_and_left_as_it_was(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SsmpruneError, match=r"--plot: .* cannot be written: "):
        check_place(tmp_path / name, "--plot")
    for good in ("new", "new/a/b.svg", "file", "."):
        check_place(tmp_path / good)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_folder_for_results_is_new_or_may_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"--out: .* is a file, not a folder"):
        check_folder(tmp_path / "file", "--resume", allowed=True)
    with pytest.raises(UsageError, match=r"(?s)--out: the folder .* is not empty.*--resume"):
        check_folder(tmp_path, "--resume", allowed=False)
    check_folder(tmp_path, "--resume", allowed=True)
    check_folder(tmp_path / "new", "--resume", allowed=False)
