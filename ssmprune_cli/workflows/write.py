"""Where results go: a place that can be written is made sure of before any work; small files are written whole or not
at all."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from pathlib import Path

from ssmprune_cli.errors import SsmpruneError, UsageError


def check_place(path: Path | None, option: str = "--out") -> None:
    """Raises SsmpruneError unless a file or a folder can be made at `path`, or a file in a folder there; None is fine.

    Nothing is left behind. Permissions, a read-only disk and names that are too long are said before hours of work.
    """
    if path is None:
        return
    try:
        place = path
        while not place.is_dir() and place != place.parent:
            if os.path.lexists(place) and place != path:
                raise NotADirectoryError(errno.ENOTDIR, f"{place} is a file, not a folder")
            place = place.parent
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise SsmpruneError(f"{path} cannot be written: {error.strerror or error}", where=option) from error


def check_folder(folder: Path, unless: str, *, allowed: bool, option: str = "--out") -> None:
    """`check_place` for a folder. Raises UsageError if it is a file, or has files and the option `unless` is not given
    (`allowed`)."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file, not a folder", where=option)
    if not allowed and folder.is_dir() and any(folder.iterdir()):
        raise UsageError(
            f"the folder {folder} is not empty", where=option, hint=f"Choose another folder, or give `{unless}`."
        )
    check_place(folder, option)


def write_text(path: Path, text: str) -> None:
    """Write `text` to a temporary file beside `path` and rename it. Raises SsmpruneError if it cannot be written.

    Bytes of file names that are no UTF-8 are written as escapes.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _remove_stale(path)
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        temporary.replace(path)
    except OSError as error:
        raise SsmpruneError(f"cannot be written: {error.strerror or error}", where=str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _remove_stale(path: Path) -> None:
    """Temporary files of `path` that killed processes have left."""
    start, end = f".{path.name}.", ".tmp"
    for other in path.parent.iterdir():
        number = other.name[len(start) : -len(end)]
        if other.name.startswith(start) and other.name.endswith(end) and number.isdecimal() and not _runs(int(number)):
            other.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    if os.name != "posix":  # there it would end the process
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # it is another user's
        return True
    return True
