"""A folder written or replaced as a whole: whenever the process is killed, the old one or the new one is there.

The new folder is made beside the old one under a temporary name, `.NAME.XXXXXXXX.tmp`, and then the two names are
exchanged in one step of the file system. Where it has no such step, the old folder is set aside for a moment as
`.NAME.XXXXXXXX.old`; if the process ends in that moment, `recover` puts it back. A folder in use is locked by its
process, and the lock ends with it: what is not locked is left over from a process that was killed.

Files, and the names of the new folder, are on the disk before the exchange, so that a loss of power is no worse.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux
_RENAME_SWAP = 2  # of macOS
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}


def write_folder(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Make `folder` a folder of these files (name to content) and nothing else, in one step. Raises OSError."""
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    recover(folder)
    _sweep(folder)
    temporary = _new_name(folder, "tmp")
    try:
        temporary.mkdir()
        with _locked(temporary):
            for name, content in contents.items():
                with (temporary / name).open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            _sync_names(temporary)
            _replace(folder, temporary)
            _sync_names(folder.parent)
    finally:  # on Ctrl-C too; after an exchange this is the old folder
        shutil.rmtree(temporary, ignore_errors=True)


def recover(folder: Path) -> None:
    """Put the old `folder` back if a killed process had set it aside and not yet renamed the new one."""
    if os.path.lexists(folder) or not folder.name:
        return
    folder = folder.absolute()
    for old in _left_over(folder, "old"):
        with _locked(old) as free:
            if free and not os.path.lexists(folder):
                old.rename(folder)


def probe(folder: Path) -> None:
    """Raises OSError if `write_folder` could not begin: no permission, a read-only disk, a name that is too long."""
    folder = folder.resolve()
    parent = folder.parent
    while not os.path.lexists(parent):
        parent = parent.parent
    trial = _new_name(parent / folder.name, "tmp")
    trial.mkdir()
    trial.rmdir()


def _sync_names(folder: Path) -> None:
    """Write the names in `folder` to the disk. Windows does not offer it, and some network file systems refuse it."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _new_name(folder: Path, ending: str) -> Path:
    return folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.{ending}")


def _left_over(folder: Path, ending: str) -> list[Path]:
    """Folders beside `folder` that `write_folder` made, and that are locked if they are in use."""
    pattern = re.compile(rf"\.{re.escape(folder.name)}\.[0-9a-f]{{8}}\.{ending}")
    try:
        return sorted(each for each in folder.parent.iterdir() if pattern.fullmatch(each.name))
    except OSError:
        return []


def _sweep(folder: Path) -> None:
    """Remove what killed processes left beside `folder`, which is there or was never."""
    for each in [*_left_over(folder, "tmp"), *(_left_over(folder, "old") if os.path.lexists(folder) else [])]:
        with _locked(each) as free:
            if free:
                shutil.rmtree(each, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold the lock of `folder`; gives whether it was free. Where there are no locks, nothing is ever taken as free."""
    if sys.platform == "win32":
        yield False
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except OSError:
            free = False
        yield free
    finally:
        os.close(descriptor)


def _replace(folder: Path, new: Path) -> None:
    """Rename `new` to `folder`. An old `folder` takes the name of `new` if the file system exchanges names."""
    if not folder.exists() or not any(folder.iterdir()):
        new.rename(folder)  # over an empty folder too
        return
    if _exchange(folder, new):
        return
    old = _new_name(folder, "old")
    with _locked(folder):
        folder.rename(old)
        try:
            new.rename(folder)
        except BaseException:
            old.rename(folder)
            raise
        shutil.rmtree(old)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step; False where this cannot be done. Raises OSError for anything else."""
    if sys.platform == "win32":
        return False
    library = ctypes.CDLL(None, use_errno=True)
    one, two = os.fsencode(first), os.fsencode(second)
    if hasattr(library, "renameat2"):
        failed = library.renameat2(_AT_FDCWD, one, _AT_FDCWD, two, _RENAME_EXCHANGE)
    elif hasattr(library, "renamex_np"):
        failed = library.renamex_np(one, two, _RENAME_SWAP)
    else:
        return False
    if not failed:
        return True
    number = ctypes.get_errno()
    if number in _UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(first))
