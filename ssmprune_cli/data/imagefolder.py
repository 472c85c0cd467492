"""A folder for each class, as torchvision's ImageFolder has it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ssmprune_cli.data.datasets import SPLIT_FOLDERS, ImageFiles, Split
from ssmprune_cli.data.files import by_number, check_folder, counted, find_images, first_file, read_lines, subfolders
from ssmprune_cli.errors import DataError, listing

_SPLITS = {name for folders in SPLIT_FOLDERS.values() for name in folders}
_LISTS = ("classes.txt", "class_names.txt", "labels.txt", "class_to_idx.json")  # what users keep beside such folders


def open_imagefolder(root: Path, split: Split) -> ImageFiles:
    """`root`/<class>/*, or `root`/<split>/<class>/* if it is divided. Classes are numbered by sorted name.

    Its notes name another order that is possible, classes without images and kinds of files that are left out. Raises
    DataError if there are no class folders or no images in them, or if `root` has only the other split.
    """
    check_folder(root)
    folder = _split_folder(root, split)
    classes = [path.name for path in subfolders(folder)]
    if not classes:
        raise DataError("has no class folders", where=str(folder), hint="Expected <class>/<image>, a folder per class.")
    others = list(_other_orders(classes, (folder, root)))
    notes = [f"{folder}: the classes are numbered by name: {listing(classes)}; {' and '.join(others)}."]
    index = {name: number for number, name in enumerate(classes)}
    return labelled_folders(folder, index, classes, notes if others else ())


def _other_orders(classes: Sequence[str], folders: Sequence[Path]) -> Iterator[str]:
    """Orders that somebody may have trained with: by the numbers in the names, without regard to case, by a list."""
    numbered = sorted(classes, key=by_number)
    if numbered != list(classes):
        yield f"by number it would be {listing(numbered)}"
    without_case = sorted(classes, key=str.casefold)
    if without_case != list(classes):
        yield f"without regard to case it would be {listing(without_case)}"
    for name in _LISTS:
        path = first_file(name, folders)
        listed = [] if path is None else _listed(path)
        if listed != list(classes) and sorted(listed) == sorted(classes):
            yield f"{path} has another order, which is not used"


def _listed(path: Path) -> list[str]:
    """The names of classes in a list, in its order; empty if it is of another kind."""
    try:
        lines = [line.strip() for line in read_lines(path) if line.strip()]
        if path.suffix != ".json":
            return lines
        values = json.loads("\n".join(lines))
        return sorted(values, key=values.__getitem__) if isinstance(values, dict) else []
    except (DataError, ValueError, TypeError, RecursionError):
        return []


def _split_folder(root: Path, split: Split) -> Path:
    """The first folder of `split` in `root`, or `root` itself if it is not divided into splits."""
    inside = subfolders(root)
    # A class may be called "train" too: a split is told from it by having folders.
    divided = {path.name: path for path in inside if path.name in _SPLITS and subfolders(path)}
    for name in SPLIT_FOLDERS[split]:
        if name in divided:
            return divided[name]
    if inside and len(divided) == len(inside):
        raise DataError(
            f"has {', '.join(divided)} and no {split}", where=str(root), hint=f"Give {inside[0]} if you want that part."
        )
    return root


def labelled_folders(
    folder: Path, index: dict[str, int], class_names: list[str], notes: Iterable[str] = ()
) -> ImageFiles:
    """The images below every folder of `folder`, labelled by `index` of the folder's name, which must have it."""
    files: list[Path] = []
    labels: list[int] = []
    left_out: Counter[str] = Counter()
    empty: list[str] = []
    for path in subfolders(folder):
        found = find_images(path)
        files += found.files
        labels += [index[path.name]] * len(found.files)
        left_out += found.left_out
        if not found.files:
            empty.append(f"{path.name} (only {counted(found.left_out)})" if found.left_out else path.name)
    if not files:
        held = f", only {counted(left_out)}" if left_out else ""
        raise DataError(f"has no images in its class folders{held}", where=str(folder))
    more = [f"{folder}: no images of {_classes(len(empty))} {listing(empty)}."] if empty else []
    if left_out:
        more.append(f"{folder}: files that are not read as images were left out: {counted(left_out)}.")
    return ImageFiles(folder, files, labels, class_names, (*notes, *more))


def _classes(count: int) -> str:
    return "the class" if count == 1 else f"{count} classes:"
