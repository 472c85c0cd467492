"""A folder for each class, as torchvision's ImageFolder has it."""

from __future__ import annotations

from pathlib import Path

from ssmprune_cli.data.datasets import ImageFiles, check_folder, image_files, subfolders
from ssmprune_cli.errors import DataError


def open_imagefolder(root: Path) -> ImageFiles:
    """`root`/<class>/*, or `root`/val/<class>/* if there is such a folder. Classes are numbered by sorted name.

    Raises DataError if there are no class folders or no images in them.
    """
    check_folder(root)
    folder = root / "val" if (root / "val").is_dir() and subfolders(root / "val") else root
    classes = [path.name for path in subfolders(folder)]
    if not classes:
        raise DataError("has no class folders", where=str(folder), hint="Expected <class>/<image>, a folder per class.")
    return labelled_folders(folder, {name: index for index, name in enumerate(classes)}, classes)


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
