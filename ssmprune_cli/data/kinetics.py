"""Kinetics, and data sets laid out like it: a list of clips with labels, as VideoMamba's code reads it, or a folder
for each class."""

from __future__ import annotations

from pathlib import Path

from ssmprune_cli.data.clips import Clips, find_clips, is_clip
from ssmprune_cli.data.datasets import SPLIT_FOLDERS, Split
from ssmprune_cli.data.files import check_folder, counted, first_file, read_lines, subfolders
from ssmprune_cli.errors import DataError, listing, shown


def open_kinetics(root: Path, split: Split) -> Clips:
    """`root`/val.csv (for val also validation.csv or test.csv; for train train.csv): in each line the path of a clip
    from `root` on and its label, with a comma or a space between. Without such a list `root`/<class>/<clip>, or
    `root`/<split>/<class>/<clip>; classes are numbered by sorted name. A clip is a video or a folder of frames.

    Raises DataError for what is neither, and for a line that cannot be read.
    """
    check_folder(root)
    for name in SPLIT_FOLDERS[split]:
        listed = first_file(f"{name}.csv", [root])
        if listed is not None:
            return _listed(root, listed)
    folder = next((root / name for name in SPLIT_FOLDERS[split] if (root / name).is_dir()), root)
    return _class_folders(folder)


def _listed(root: Path, path: Path) -> Clips:
    files, labels = [], []
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        name, comma, label = line.rpartition(",")
        if not comma:
            name, _, label = line.rstrip().rpartition(" ")
        where = f"{path}, line {number}"
        if not name.strip() or not (label.strip().isascii() and label.strip().isdigit() and len(label) < 9):
            raise DataError(
                f"is not a path and a label: {shown(line)!r}",
                where=where,
                hint="Expected: clips/abc.mp4,17",
            )
        file = root / name.strip()
        if not is_clip(file) or not file.exists():
            problem = "is neither a video nor a folder of frames" if file.exists() else "there is no such clip"
            raise DataError(f"{problem}: {shown(name.strip())}", where=where)
        files.append(file)
        labels.append(int(label))
    if not files:
        raise DataError("lists no clips", where=str(path))
    outside = [file for file in files if not file.is_relative_to(root)]
    return Clips(Path(files[0].anchor) if outside else root, files, labels)


def _class_folders(folder: Path) -> Clips:
    classes = [path.name for path in subfolders(folder)]
    files: list[Path] = []
    labels: list[int] = []
    empty = []
    for label, name in enumerate(classes):
        if is_clip(folder / name):
            raise DataError(
                "has images in it, where a class folder has clips",
                where=str(folder / name),
                hint="Expected <class>/<clip>/<frame>, or videos in <class>. A model of clips takes no single images.",
            )
        found, left_out = find_clips(folder / name)
        files += found
        labels += [label] * len(found)
        if not found:
            empty.append(f"{name} (only {counted(left_out)})" if left_out else name)
    if not files:
        raise DataError(
            "has no clips",
            where=str(folder),
            hint="Expected val.csv with a path and a label in each line, or <class>/<clip>, a folder per class.",
        )
    notes = [f"{folder}: no clips of {listing(empty)}."] if empty else []
    return Clips(folder, files, labels, classes, notes)
