"""Where a file is written before it is known to be good."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def placed(path: Path) -> Iterator[Path]:
    """A place beside `path`, of its suffix. What is still there at the end is removed, and so are the folders that were
    made for it if nothing is in them: a failed or interrupted export leaves nothing behind."""
    made = [folder for folder in path.parents if not folder.exists()]  # the innermost first
    temporary = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
        for folder in made:
            with contextlib.suppress(OSError):  # something is in it
                folder.rmdir()
