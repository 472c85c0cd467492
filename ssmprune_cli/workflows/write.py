"""Small files, written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from ssmprune_cli.errors import SsmpruneError


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
