"""Any folder of images beside a folder of masks, as most data sets for segmentation are laid out."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ssmprune_cli.data.datasets import Split
from ssmprune_cli.data.files import check_folder, first_file, read_lines, subfolders
from ssmprune_cli.data.masks import NOT_JUDGED, Mask, MaskedImages, Meaning, paired
from ssmprune_cli.errors import DataError, shown

IMAGES = "images"
MASKS = ("masks", "labels", "annotations")
LIST = "classes.txt"
# Names of what is no class, as lists of data sets have them.
VOID = ("void", "unlabelled", "unlabeled", "ignore", "ignored")
_SPLITS: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "test", "testing"),
}
_PARTS = {name for names in _SPLITS.values() for name in names}
_HINT = (
    f"Expected {IMAGES}/ and one of {'/, '.join(MASKS)}/ with files of the same names, divided into train/ and val/ "
    f"inside of each, around both, or not at all. A part of another name is given itself: DIR/{IMAGES}/test."
)


def open_segfolder(root: Path, split: Split) -> MaskedImages:
    """`root`/images/** and `root`/masks/** (or labels, annotations), each mask of the name of its image.

    If these are divided, `split` of them: images/val and masks/val, or val/images and val/masks. `root` may also be
    such a part itself, images/test. A mask's values are classes, 255 is none. A classes.txt beside images/, or beside
    the part of the data that it is in, has their names, one a line from class 0 on; a line of VOID says that the value
    is none, and a note tells.

    Raises DataError for another layout, an image or a mask alone, and a classes.txt that is no list of names.
    """
    check_folder(root)
    images, masks = _folders(root, split)
    home = next(folder for folder in (images, *images.parents) if folder.name == IMAGES).parent
    around = [home.parent] if home.name in _PARTS else []
    meaning, notes = _meaning(first_file(LIST, [home, *around]))
    return paired(home, images, masks, meaning, notes)


def _folders(root: Path, split: Split) -> tuple[Path, Path]:
    """Of images and of masks."""
    here = root.absolute()
    for base in (root, *(root / part for part in _SPLITS[split])):
        pairs = [(base / IMAGES, base / name) for name in MASKS if (base / name).is_dir()]
        if (base / IMAGES).is_dir() and pairs:
            return _only(base, pairs, split)
    if IMAGES in here.parts:  # a part of the images
        place = len(here.parts) - 1 - here.parts[::-1].index(IMAGES)
        base, inside = Path(*here.parts[:place]), Path(*here.parts[place + 1 :])
        pairs = [(here, base / name / inside) for name in MASKS if (base / name / inside).is_dir()]
        if len(pairs) == 1:
            return pairs[0]
    raise DataError(f"has no {IMAGES}/ beside {'/, '.join(MASKS[:-1])}/ or {MASKS[-1]}/", where=str(root), hint=_HINT)


def _only(base: Path, pairs: list[tuple[Path, Path]], split: Split) -> tuple[Path, Path]:
    """Of the folders that may hold masks the only one; of a divided pair the part of `split`."""
    if len(pairs) > 1:
        raise DataError(
            f"has {' and '.join(f'{masks.name}/' for _, masks in pairs)}: which are the masks?",
            where=str(base),
            hint="Leave one of them under that name.",
        )
    ((images, masks),) = pairs
    divided = {folder.name for folder in subfolders(images)} & _PARTS
    if not divided:
        return images, masks
    for part in _SPLITS[split]:
        if part in divided:
            return images / part, masks / part
    raise DataError(
        f"is divided into {', '.join(sorted(divided))}, and has no {split}",
        where=str(images),
        hint=f"Give {images / min(divided)} if you want that part.",
    )


def _meaning(path: Path | None) -> tuple[Meaning, tuple[str, ...]]:
    """By the list of names, if there is one. Raises DataError if it is none."""
    if path is None:
        return Meaning(_as_they_are, None), ()
    names = [line.strip() for line in read_lines(path)]
    while names and not names[-1]:
        names.pop()
    fault = "names no class" if not names else "has an empty line" if "" in names else ""
    if twice := [name for name in names if names.count(name) > 1]:
        fault = f"names {shown(twice[0])!r} twice"
    if len(names) > NOT_JUDGED + 1:
        fault = f"names {len(names)} classes, more than a mask of 8 bits has"
    if fault:
        raise DataError(fault, where=str(path), hint="It has a name for each value of the masks, one a line.")
    void = [value for value, name in enumerate(names) if name.casefold() in VOID]
    listed = ", ".join(f"{names[value]} ({value})" for value in void)
    notes = (f"{path}: pixels of {listed} are not judged.",) if void else ()
    while len(names) - 1 in void:  # a void class in between keeps the numbers of those after it
        names.pop()
    return Meaning(_Without(tuple(void)), len(names), tuple(names)), notes


def _as_they_are(values: Mask) -> Mask:
    return values


class _Without:
    """Values as classes, but for those that are none."""

    def __init__(self, void: tuple[int, ...]) -> None:
        self._classes = np.arange(256, dtype=np.uint8)
        self._classes[list(void)] = NOT_JUDGED

    def __call__(self, values: Mask) -> Mask:
        classes: Mask = self._classes[values]
        return classes
