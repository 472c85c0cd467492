"""ImageNet-1k (ILSVRC2012) in its usual layouts. Classes are numbered by sorted WordNet id."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from ssmprune_cli.data.datasets import ImageFiles, Split
from ssmprune_cli.data.files import check_folder, counted, find_images, first_file, read_lines, subfolders
from ssmprune_cli.data.imagefolder import labelled_folders
from ssmprune_cli.errors import DataError, shown

_NAME = re.compile(r"ILSVRC2012_val_(\d{8})")
_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_KAGGLE = "LOC_val_solution.csv"
_KAGGLE_IMAGES = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")  # below the folder with Kaggle's CSV files
_IMAGES = 50_000  # in the whole validation set


def devkit_wnids() -> tuple[str, ...]:
    """The 1,000 WordNet ids in the order of ILSVRC2012_ID, 1 to 1000, in the development kit's meta.mat."""
    return tuple(resources.files("ssmprune_cli.data").joinpath("imagenet_wnids.txt").read_text("ascii").split())


def wnids() -> tuple[str, ...]:
    """The 1,000 WordNet ids, sorted: the class of index i is the i-th of them."""
    return tuple(sorted(devkit_wnids()))


def open_imagenet(root: Path, split: Split) -> ImageFiles:
    """The images in `root`/`split` or `root`, labelled by folder or, if of "val", by a list. Part of them is enough.

    Folders are named by WordNet id. A flat folder of ILSVRC2012_val_*.JPEG needs, in it or in `root`, one of: Kaggle's
    LOC_val_solution.csv; `val.txt` (lines "name index" or "name wnid"); the official
    ILSVRC2012_validation_ground_truth.txt, whose ids are in the development kit's order and not in that of the sorted
    WordNet ids. `root` may be the folder of Kaggle's archive.

    Raises DataError for an unknown WordNet id, a missing list, lists that contradict each other or themselves, or an
    image that the list lacks.
    """
    check_folder(root)
    inside = [root / split, *(root / path / split for path in _KAGGLE_IMAGES)]
    folder = next((path for path in inside if path.is_dir()), root)
    names = wnids()
    index = {wnid: number for number, wnid in enumerate(names)}
    classes = [path.name for path in subfolders(folder)]
    if classes:
        unknown = [name for name in classes if name not in index]
        if unknown:
            raise DataError(
                f"{shown(unknown[0])!r} is no WordNet id of ImageNet-1k",
                where=str(folder),
                hint="Expected val/<wnid>/*.JPEG. For folders with other names use `--dataset imagefolder`.",
            )
        return labelled_folders(folder, index, list(names))
    found = find_images(folder)
    files = [path for path in found.files if _NAME.fullmatch(path.stem)]
    if not files:
        raise DataError("has neither folders named by WordNet id nor images ILSVRC2012_val_*.JPEG", where=str(folder))
    labels, notes = _listed(root, folder, files, index)
    if found.left_out:
        notes.append(f"{folder}: files that are not read as images were left out: {counted(found.left_out)}.")
    return ImageFiles(folder, files, labels, names, notes)


@dataclass
class _List:
    """Labels by file stem, as a list states them. A second, different label of an image is an error."""

    path: Path
    labels: dict[str, int] = field(default_factory=dict)
    by_number: bool = False  # whether it has indices rather than WordNet ids

    def add(self, stem: str, label: int, line: int) -> None:
        if self.labels.setdefault(stem, label) != label:
            raise DataError(
                f"{shown(stem)} has the class {label} here and {self.labels[stem]} before",
                where=f"{self.path}, line {line}",
            )


def _listed(root: Path, folder: Path, files: list[Path], index: dict[str, int]) -> tuple[list[int], list[str]]:
    """The label of each of `files` by the lists that are there, and what a user should know of them."""
    readers = {_KAGGLE: _kaggle_list, "val.txt": _val_list, _TRUTH: _ground_truth}
    paths = [first_file(name, (root, folder)) for name in readers]
    lists = [read(path, index) for path, read in zip(paths, readers.values(), strict=True) if path is not None]
    if not lists:
        raise DataError(
            "has images but no labels for them",
            where=str(folder),
            hint=f"Put {_KAGGLE} of Kaggle, {_TRUTH} of the development kit or val.txt "
            '(lines "name index" or "name wnid") beside them.',
        )
    stems = [path.stem for path in files]
    for other in lists[1:]:
        _check_agreement(lists[0], other, stems)
    chosen = lists[0]
    missing = [path.name for path in files if path.stem not in chosen.labels]
    if missing:
        raise DataError(f"does not list {missing[0]} ({len(missing)} images are not listed)", where=str(chosen.path))
    notes = []
    if len(lists) == 1 and chosen.by_number:
        notes.append(
            f"{chosen.path}: its numbers are taken as indices from 0 in the order of the sorted WordNet ids, "
            "not as the ids of the development kit."
        )
    return [chosen.labels[stem] for stem in stems], notes


def _check_agreement(first: _List, second: _List, stems: Iterable[str]) -> None:
    for stem in stems:
        labels = [each.labels.get(stem) for each in (first, second)]
        if None not in labels and labels[0] != labels[1]:
            raise DataError(
                f"says that {stem} has the class {labels[0]}, and {second.path} says {labels[1]}",
                where=str(first.path),
                hint="Take away the list that is wrong. Indices count the sorted WordNet ids from 0.",
            )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not empty, and their numbers from 1."""
    return ((number, line) for number, line in enumerate(read_lines(path), start=1) if line.strip())


def _kaggle_list(path: Path, index: dict[str, int]) -> _List:
    """Rows `ILSVRC2012_val_00000001,n03995372 85 1 499 272 n03995372 ...`: a WordNet id and a box, for each object."""
    found = _List(path)
    for number, line in _lines(path):
        try:
            (cells,) = csv.reader([line])
        except (ValueError, csv.Error):
            cells = []
        if number == 1 and cells[:1] == ["ImageId"]:
            continue
        words = cells[1].split() if len(cells) == 2 else []
        classes = {index.get(word) for word in words[::5]}
        label = classes.pop() if len(classes) == 1 else None
        if label is None or len(words) % 5:
            raise DataError(f'"{shown(line)}" is not "name,wnid x y x y"', where=f"{path}, line {number}")
        found.add(Path(cells[0]).stem, label, number)
    return found


def _val_list(path: Path, index: dict[str, int]) -> _List:
    found = _List(path)
    for number, line in _lines(path):
        words = line.split()
        label = _class_index(words[1], index) if len(words) == 2 else None
        if label is None:
            raise DataError(
                f'"{shown(line)}" is not "name index" (0 to 999) or "name wnid"',
                where=f"{path}, line {number}",
                hint="Indices count the sorted WordNet ids from 0. Ids of the development kit count from 1: give "
                f"{_TRUTH} instead.",
            )
        found.by_number |= words[1] not in index
        found.add(Path(words[0]).stem, label, number)
    return found


def _class_index(word: str, index: dict[str, int]) -> int | None:
    return int(word) if _is_number(word) and int(word) < len(index) else index.get(word)


def _is_number(word: str) -> bool:
    return len(word) <= 4 and word.isascii() and word.isdecimal()


def _ground_truth(path: Path, index: dict[str, int]) -> _List:
    """Line n is about image n, and has an ILSVRC2012_ID."""
    lines = read_lines(path)
    if len(lines) != _IMAGES:
        raise DataError(
            f"has {len(lines):,} lines, not the {_IMAGES:,} of ILSVRC2012",
            where=str(path),
            hint='For a part of the images give val.txt (lines "name index" or "name wnid").',
        )
    order = devkit_wnids()
    found = _List(path)
    for number, line in enumerate(lines, start=1):
        word = line.strip()
        if not _is_number(word) or not 1 <= int(word) <= len(order):
            raise DataError(f'"{shown(line)}" is no id from 1 to {len(order)}', where=f"{path}, line {number}")
        found.add(f"ILSVRC2012_val_{number:08d}", index[order[int(word) - 1]], number)
    return found
