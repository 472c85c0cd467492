"""A folder for each class, as torchvision's ImageFolder has it."""

from __future__ import annotations

from pathlib import Path

from ssmprune_cli.data.datasets import SPLIT_FOLDERS, ImageFiles, Split, check_folder, image_files, subfolders
from ssmprune_cli.errors import DataError

_SPLITS = {name for folders in SPLIT_FOLDERS.values() for name in folders}


def open_imagefolder(root: Path, split: Split) -> ImageFiles:
    """`root`/<class>/*, or `root`/<split>/<class>/* if it is divided. Classes are numbered by sorted name.

    Raises DataError if there are no class folders or no images in them, or if `root` has only the other split.
    """
    check_folder(root)
    folder = _split_folder(root, split)
    classes = [path.name for path in subfolders(folder)]
    if not classes:
        raise DataError("has no class folders", where=str(folder), hint="Expected <class>/<image>, a folder per class.")
    return labelled_folders(folder, {name: index for index, name in enumerate(classes)}, classes)


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


def labelled_folders(folder: Path, index: dict[str, int], class_names: list[str]) -> ImageFiles:
    """The images below every folder of `folder`, labelled by `index` of the folder's name, which must have it."""
    files: list[Path] = []
    labels: list[int] = []
    for path in subfolders(folder):
        found = image_files(path)
        files += found
        labels += [index[path.name]] * len(found)
    if not files:
        raise DataError("has no images in its class folders", where=str(folder))
    return ImageFiles(folder, files, labels, class_names)
