"""Opening what a user names: regular files only, of bounded size; text lists; and what lies in a folder."""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ssmprune_cli.errors import DataError, listing, shown
from ssmprune_cli.files import read_bytes

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
# Files beside images that nobody takes for one. Any other kind that is left out is named.
_NO_IMAGE = frozenset(
    {".cache", ".csv", ".db", ".html", ".ini", ".json", ".log", ".mat", ".md", ".py", ".txt", ".xml", ".yaml", ".yml"}
)
_MOST_TEXT = 1 << 25  # bytes of a list: those of ImageNet's 50,000 images have a tenth of it


def read_lines(path: Path) -> list[str]:
    """The lines of a list, a byte-order mark left out. DataError if it is no text in UTF-8."""
    content = read_bytes(path, _MOST_TEXT, DataError)
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError("is text in UTF-16", where=str(path), hint="Save it as UTF-8.")
    try:
        return content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"cannot be read: it is no text in UTF-8 (byte {error.start})", where=str(path)) from error


@dataclass(frozen=True)
class Found:
    """Image files below a folder, sorted by path, and how many others there were by suffix."""

    files: list[Path]
    left_out: Counter[str]


def find_images(folder: Path) -> Found:
    """Every image file (by its suffix) in `folder` and below, hidden files and folders left out.

    Links are followed, each folder is read once. Raises DataError for a folder that cannot be read.
    """
    files: list[Path] = []
    left_out: Counter[str] = Counter()
    seen: set[tuple[int, int]] = set()  # a link to a folder above would give its images again
    waiting = [folder]
    while waiting:
        here = waiting.pop()
        status = here.stat()
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        inside = entries(here)
        waiting += [path for path in reversed(inside) if _is_folder(path)]
        for path in inside:
            if not _is_folder(path):
                suffix = path.suffix.lower()
                if suffix in IMAGE_SUFFIXES:
                    files.append(path)
                elif suffix not in _NO_IMAGE:
                    left_out[suffix or "without a suffix"] += 1
    return Found(sorted(files, key=lambda path: path.relative_to(folder).parts), left_out)


def counted(left_out: Counter[str]) -> str:
    """How many files of which kinds, the most frequent first."""
    return listing(f"{count} {suffix}" for suffix, count in left_out.most_common())


def entries(folder: Path) -> list[Path]:
    """What lies in `folder`, sorted by name, hidden files and folders left out. DataError if it cannot be read."""
    try:
        return sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=lambda path: path.name)
    except OSError as error:
        raise DataError(f"cannot be read: {_reason(error)}", where=str(folder)) from error


def subfolders(folder: Path) -> list[Path]:
    """The folders in `folder`, sorted by name, hidden ones left out."""
    return [path for path in entries(folder) if _is_folder(path)]


def by_number(name: str) -> list[tuple[int, str]]:
    """By what names are sorted so that numbers in them are in order: 2 before 10."""
    parts = re.split(r"([0-9]+)", name)
    return [(int(part), "") if number % 2 else (-1, part) for number, part in enumerate(parts)]


def check_folder(folder: Path) -> None:
    """Raises DataError unless `folder` is a folder."""
    if not _is_folder(folder):
        raise DataError("is not a folder" if os.path.lexists(folder) else "does not exist", where=str(folder))


def first_file(name: str, folders: Iterable[Path]) -> Path | None:
    """The first file called `name` in one of `folders`."""
    return next((folder / name for folder in folders if _exists(folder / name)), None)


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def _exists(path: Path) -> bool:
    return os.path.lexists(path) and not _is_folder(path)


def _reason(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "there is not enough memory"
    return (isinstance(error, OSError) and error.strerror) or shown(str(error))
