"""ADE20K in the layout of its scene parsing benchmark, ADEChallengeData2016: 150 classes."""

from __future__ import annotations

from pathlib import Path

from ssmprune_cli.data.datasets import Split
from ssmprune_cli.data.files import check_folder, first_file, read_lines
from ssmprune_cli.data.masks import NOT_JUDGED, Mask, MaskedImages, Meaning, paired
from ssmprune_cli.errors import DataError

FOLDER = "ADEChallengeData2016"
_CLASSES = 150
_NAMES = "objectInfo150.txt"
_SPLITS: dict[Split, str] = {"train": "training", "val": "validation"}


def is_ade20k(path: Path) -> bool:
    """Whether `path` is ADEChallengeData2016 by its name, or holds a folder of that name."""
    return path.absolute().name == FOLDER or (path / FOLDER).is_dir()


def open_ade20k(root: Path, split: Split) -> MaskedImages:
    """The images of `split` in `root`, which is ADEChallengeData2016 or holds it: images/validation/*.jpg and
    annotations/validation/*.png. A mask's 0 is no class (`reduce_zero_label`), 1 is class 0.

    Class names are those of objectInfo150.txt, if it is there. Raises DataError for another layout.
    """
    check_folder(root)
    base = root / FOLDER if (root / FOLDER).is_dir() else root
    images, masks = (base / kind / _SPLITS[split] for kind in ("images", "annotations"))
    for folder in (images, masks):
        if not folder.is_dir():
            raise DataError(
                f"has no {folder.relative_to(base).as_posix()}",
                where=str(base),
                hint=f"Expected {FOLDER}/images/{_SPLITS[split]} and {FOLDER}/annotations/{_SPLITS[split]}. For other "
                "folders of images and masks use `--dataset segfolder`.",
            )
    return paired(base, images, masks, Meaning(without_zero, _CLASSES, _names(base)))


def without_zero(values: Mask) -> Mask:
    """The class of each pixel (H, W): 0 is none, and 255 stays none."""
    return (values - (values < NOT_JUDGED)).astype(values.dtype)


def _names(base: Path) -> tuple[str, ...]:
    """The first of each class's names, in order; none without the list."""
    path = first_file(_NAMES, [base])
    if path is None:
        return ()
    rows = [line.split("\t") for line in read_lines(path) if line.strip()][1:]
    names = tuple(row[-1].split(",")[0].strip() for row in rows)
    if len(names) != _CLASSES or [row[0].strip() for row in rows] != [str(1 + index) for index in range(_CLASSES)]:
        raise DataError(
            f"does not list the {_CLASSES} classes of ADE20K by number, below a line of titles", where=str(path)
        )
    return names
