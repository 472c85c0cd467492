"""An artefact is replaced as a whole: the process is killed at every line, and the old or the new one is there."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from ssmprune_cli.checkpoint import check_writable, replacing
from ssmprune_cli.checkpoint.replacing import recover, write_folder
from ssmprune_cli.errors import CheckpointError

OLD, NEW = {"config.json": b"old", "weights": b"o" * 5000}, {"config.json": b"new", "weights": b"n" * 5000, "x": b"x"}
TRACED = (replacing.__file__, shutil.__file__)


def content(folder: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in folder.iterdir()}


def killed_at(line: int, work: Callable[[], None]) -> bool:
    """Run `work` in a process that is killed when it comes to its so many-th line; whether it was."""
    child = os.fork()
    if child == 0:
        left = line

        def trace(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal left
            if frame.f_code.co_filename not in TRACED:
                return None
            if event == "line":
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        try:
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("exchanges", [True, False])
def test_killed_at_every_line_the_old_or_the_new_folder_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool
) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # of no matter for a kill, and slow
    if not exchanges:
        monkeypatch.setattr(replacing, "_exchange", lambda first, second: False)
    folder, line = tmp_path / "out", 0
    seen: list[bool] = []
    while True:
        write_folder(folder, OLD)
        assert [each.name for each in tmp_path.iterdir()] == ["out"]  # what the last one left is gone
        if not killed_at(line, lambda: write_folder(folder, NEW)):
            break
        recover(folder)
        assert content(folder) in (OLD, NEW), line
        seen.append(content(folder) == NEW)
        line += 1
    assert content(folder) == NEW and line > 40
    assert seen == sorted(seen) and {*seen} == {False, True}  # the old one, and from some line on the new one


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_new_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    folder, line = tmp_path / "out", 0
    while killed_at(line, lambda: write_folder(folder, NEW)) and not folder.exists():
        line += 1
    assert content(folder) == NEW and line > 20
    write_folder(folder, OLD)
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_all_is_on_the_disk_before_the_names_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "out", OLD)
    events: list[str] = []
    exchange = replacing._exchange

    def noted(first: Path, second: Path) -> bool:
        events.append("exchange")
        return exchange(first, second)

    monkeypatch.setattr(os, "fsync", lambda handle: events.append(Path(f"/proc/self/fd/{handle}").readlink().name))
    monkeypatch.setattr(replacing, "_exchange", noted)
    write_folder(tmp_path / "out", NEW)
    *files, names, exchanged, parent = events
    assert set(files) == NEW.keys() and names.startswith(".out.")
    assert (exchanged, parent) == ("exchange", tmp_path.name)


def test_what_another_process_is_writing_stays(tmp_path: Path) -> None:
    busy, dead, other = (tmp_path / name for name in (".out.0123abcd.tmp", ".out.0123abce.tmp", ".out2.0123abcd.tmp"))
    for each in (busy, dead, other):
        each.mkdir()
    descriptor = os.open(busy, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    write_folder(tmp_path / "out", NEW)
    os.close(descriptor)
    assert busy.exists() and other.exists() and not dead.exists()


def test_out_is_probed_before_any_work(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b" / "out")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CheckpointError, match="cannot be written: File name too long"):
        check_writable(tmp_path / ("x" * 250))
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written: Not a directory"):
        check_writable(tmp_path / "file" / "out")
    with pytest.raises(CheckpointError, match="cannot be written"):
        check_writable(Path("/proc/out"))
