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
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        temporary.replace(path)
    except OSError as error:
        raise SsmpruneError(f"cannot be written: {error.strerror or error}", where=str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
