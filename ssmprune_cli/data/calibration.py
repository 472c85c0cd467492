"""Images to calibrate on: any folder of images or an .npz, labelled or not."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

from ssmprune_cli.data.datasets import ImageDataset, ImageFiles, Subset, check_folder, image_files
from ssmprune_cli.data.npz import NpzImages
from ssmprune_cli.errors import DataError


def calibration_images(path: Path, count: int, seed: int) -> ImageDataset:
    """`count` images of `path`, chosen by `seed`, in the order of their names; all of them if there are fewer.

    path  an .npz with `images`, or a folder with images in it or in folders below it
    The choice depends on the images' names below `path` and on `seed` only. Raises DataError if there are none, one of
    the chosen cannot be read, or they all have the same pixels, from which nothing can be learned.
    """
    dataset = some_images(path, count, seed)
    if len({_pixels(dataset, index) for index in range(len(dataset))}) == 1 < len(dataset):
        raise DataError(f"the {len(dataset)} calibration images are all alike", where=str(path))
    return dataset


def some_images(path: Path, count: int, seed: int) -> ImageDataset:
    """`count` images of `path`, which may be a single image too, chosen as `calibration_images` does."""
    dataset: ImageDataset
    if path.suffix == ".npz":
        dataset = NpzImages(path)
    elif path.is_file():
        dataset = ImageFiles(path.parent, [path], labels=None)
    else:
        check_folder(path)
        dataset = ImageFiles(path, image_files(path), labels=None)
    if len(dataset) == 0:
        raise DataError("has no images", where=str(path))
    if count < len(dataset):
        dataset = Subset(dataset, sorted(random.Random(seed).sample(range(len(dataset)), count)))
    return dataset


def fingerprint(dataset: ImageDataset) -> str:
    """SHA-256, in hexadecimal, of the names and pixels of all images in order."""
    digest = hashlib.sha256()
    for index in range(len(dataset)):
        digest.update(hashlib.sha256(dataset.name(index).encode(errors="surrogateescape")).digest())
        digest.update(_pixels(dataset, index))
    return digest.hexdigest()


def _pixels(dataset: ImageDataset, index: int) -> bytes:
    """SHA-256 of mode, size and pixels."""
    image = dataset.image(index)
    return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).digest()
