"""Reading what a user names: regular files, so that no pipe is waited for and no device read without end."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from ssmprune_cli.errors import SsmpruneError

_KINDS = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))


def open_regular(path: Path, fault: type[SsmpruneError]) -> BinaryIO:
    """The file at `path`, opened to read. Raises a `fault` for what is missing or is no regular file."""
    try:
        # Not to wait for a writer if it is a pipe; of a regular file it means nothing.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError as error:
        raise fault("there is no such file or folder", where=str(path)) from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise fault(f"cannot be read: {reason}", where=str(path)) from error
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    kind = next((name for matches, name in _KINDS if matches(mode)), "a device")
    raise fault(f"is {kind}, not a file", where=str(path))


def read_bytes(path: Path, most: int, fault: type[SsmpruneError]) -> bytes:
    """All of a regular file. Raises a `fault` if it cannot be read or has more than `most` bytes."""
    try:
        with open_regular(path, fault) as file:
            content = file.read(most + 1)
    except MemoryError as error:
        raise fault("cannot be read: there is not enough memory", where=str(path)) from error
    except OSError as error:
        raise fault(f"cannot be read: {error.strerror or error}", where=str(path)) from error
    if len(content) > most:
        raise fault(f"has more than {most:,} bytes, too many for its kind", where=str(path))
    return content


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart; of two that are one place, the same."""
    places = [path.resolve() for path in paths]
    names = [""] * len(places)
    for depth in range(1, max((len(place.parts) for place in places), default=0) + 1):
        names = ["/".join(place.parts[-depth:]) for place in places]
        if len(set(names)) == len(set(places)):
            break
    return names
