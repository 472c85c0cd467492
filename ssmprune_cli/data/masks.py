"""Images with a mask each: the class of every pixel, in an image file of one channel."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ssmprune_cli.data.datasets import ImageFiles
from ssmprune_cli.data.files import check_folder, counted, find_images
from ssmprune_cli.data.image_file import read_image
from ssmprune_cli.errors import DataError, listing
from ssmprune_cli.files import read_bytes

NOT_JUDGED = 255
_MOST_BYTES = 1 << 28  # of a mask
_HINT = "A mask is a PNG of 8 bits in one channel, or with a palette: the value of a pixel is its class, 255 is none."

Mask = NDArray[np.uint8]


@dataclass(frozen=True)
class Meaning:
    """What the values of masks mean.

    classes  values of a mask file (H, W) -> classes, NOT_JUDGED where none is judged
    count    how many classes there are, None if nothing says so
    names    theirs, or none
    """

    classes: Callable[[Mask], Mask]
    count: int | None
    names: tuple[str, ...] = ()


class MaskedImages(ImageFiles):
    """Image files below `root`, and a file with the mask of each."""

    def __init__(
        self,
        root: Path,
        files: Sequence[Path],
        masks: Sequence[Path],
        meaning: Meaning,
        notes: Iterable[str] = (),
    ) -> None:
        super().__init__(root, files, None, meaning.names, notes)
        self._masks = masks
        self._meaning = meaning

    @property
    def num_classes(self) -> int | None:
        return self._meaning.count

    def target(self, index: int) -> Mask:
        return self._meaning.classes(read_mask(self._masks[index]))

    def mark(self, index: int) -> str:
        return hashlib.sha256(read_bytes(self._masks[index], _MOST_BYTES, DataError)).hexdigest()

    @property
    def has_targets(self) -> bool:
        return True


def read_mask(path: Path) -> Mask:
    """The values (H, W) in the file. Of a palette the indices count, whatever its colours.

    Raises DataError for a file that cannot be read, several channels, values above 255, and JPEG, which changes them.
    """
    image = read_image(path)
    if image.format == "JPEG":
        raise DataError("is a mask in JPEG, which changes the values", where=str(path), hint=_HINT)
    if image.mode not in ("1", "L", "P", "I", "I;16"):
        raise DataError(f"is no mask, but a picture in {image.mode}", where=str(path), hint=_HINT)
    values = np.asarray(image)
    if values.size and (int(values.max()) > NOT_JUDGED or int(values.min()) < 0):
        raise DataError(
            f"has values from {int(values.min())} to {int(values.max())}, beyond 8 bits", where=str(path), hint=_HINT
        )
    return values.astype(np.uint8)


def paired(
    root: Path,
    images: Path,
    masks: Path,
    meaning: Meaning,
    notes: Iterable[str] = (),
) -> MaskedImages:
    """The images in `images` and below, each with the mask in `masks` of the same path but for its suffix; named below
    `root`. Raises DataError if there are none, or if an image or a mask is alone."""
    (image_of, more), (mask_of, others) = (_by_stem(folder) for folder in (images, masks))
    for what, partner, folder, place, own, other in (
        ("image", "mask", images, masks, image_of, mask_of),
        ("mask", "image", masks, images, mask_of, image_of),
    ):
        alone = [stem for stem in own if stem not in other]
        if alone:
            raise DataError(
                f"{len(alone)} of {len(own)} {what}s have no {partner} of the same name: {listing(alone)}",
                where=str(folder),
                hint=f"The {partner}s are looked for in {place}.",
            )
    matching = [mask_of[stem] for stem in image_of]
    return MaskedImages(root, list(image_of.values()), matching, meaning, (*notes, *more, *others))


def _by_stem(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """The images in `folder` by their paths below it, suffixes left out, and a note if there are other files. DataError
    if two differ in their suffix only, or if there are none."""
    check_folder(folder)
    inside = find_images(folder)
    left_out = counted(inside.left_out)
    if not inside.files:
        raise DataError(f"has no images{left_out and f', only {left_out}'}", where=str(folder))
    files: dict[str, Path] = {}
    for path in inside.files:
        stem = path.relative_to(folder).with_suffix("").as_posix()
        if stem in files:
            raise DataError(f"{files[stem].name} and {path.name} have the same name", where=str(path.parent))
        files[stem] = path
    return files, [f"{folder}: files that are not read as images were left out: {left_out}."] if left_out else []
