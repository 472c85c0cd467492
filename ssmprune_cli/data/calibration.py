"""Images to calibrate on: any folder of images or an .npz, labelled or not."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from ssmprune_cli.data.clips import some_clips
from ssmprune_cli.data.datasets import ImageDataset, ImageFiles, chosen
from ssmprune_cli.data.files import check_folder, counted, find_images
from ssmprune_cli.data.npz import NpzImages
from ssmprune_cli.errors import DataError
from ssmprune_cli.files import read_bytes

_MOST_BYTES = 1 << 25  # of a list of files


def calibration_images(path: Path, count: int, seed: int, *, clips: bool = False) -> ImageDataset:
    """`count` images of `path`, chosen by `seed`, in the order of their names; all of them if there are fewer. With
    `clips`, so many clips, see `some_clips`.

    path  an .npz with `images`, a folder with images in it or in folders below it, or a .txt that lists files: a path
          in each line, from the list's own folder
    The choice depends on the images' names below `path` and on `seed` only. Raises DataError if there are none, one of
    the chosen cannot be read, or they all have the same pixels, from which nothing can be learned.
    """
    return differing(some_clips(path, count, seed) if clips else some_images(path, count, seed), path)


def differing(dataset: ImageDataset, path: Path) -> ImageDataset:
    """`dataset`, which was read from `path`. DataError if all in it is alike."""
    if len({dataset.content(index) for index in range(len(dataset))}) == 1 < len(dataset):
        what = "clips" if dataset.clips else "images"
        raise DataError(f"the {len(dataset)} calibration {what} are all alike", where=str(path))
    return dataset


def some_images(path: Path, count: int, seed: int) -> ImageDataset:
    """`count` images of `path`, which may be a single image too, chosen as `calibration_images` does."""
    dataset: ImageDataset
    if path.suffix == ".npz":
        dataset = NpzImages(path, "train")
    elif path.suffix == ".txt" and not path.is_dir():
        dataset = listed_images(_listed(path))
    elif path.exists() and not path.is_dir():
        dataset = ImageFiles(path.parent, [path], labels=None)
    else:
        check_folder(path)
        found = find_images(path)
        left_out = counted(found.left_out)
        if not found.files:
            raise DataError(f"has no images{left_out and f', only {left_out}'}", where=str(path))
        notes = [f"{path}: files that are not read as images were left out: {left_out}."] if left_out else []
        dataset = ImageFiles(path, found.files, labels=None, notes=notes)
    return chosen(dataset, count, seed)


def listed_images(files: Sequence[Path]) -> ImageDataset:
    """These image files, in this order. Raises DataError if one of them is missing."""
    for file in files:
        if not file.exists():
            raise DataError("there is no such file", where=str(file))
    root = Path(os.path.commonpath([file.absolute().parent for file in files]))
    return ImageFiles(root, [file.absolute() for file in files], labels=None)


def _listed(path: Path) -> list[Path]:
    """The files that a text names, one a line. Raises DataError for a text that names none."""
    text = read_bytes(path, _MOST_BYTES, DataError).decode("utf-8", errors="surrogateescape")
    files = [path.parent / line.strip() for line in text.splitlines() if line.strip()]
    if not files:
        raise DataError("lists no images", where=str(path), hint="Write the path of an image in each line.")
    return files


def fingerprint(dataset: ImageDataset) -> str:
    """SHA-256, in hexadecimal, of the names and pixels of all images in order; of clips, of their files."""
    digest = hashlib.sha256()
    for index in range(len(dataset)):
        digest.update(hashlib.sha256(dataset.name(index).encode(errors="surrogateescape")).digest())
        digest.update(dataset.content(index))
    return digest.hexdigest()
