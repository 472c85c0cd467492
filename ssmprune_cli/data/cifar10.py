"""The CIFAR-10 test set, in layouts that can be read without running code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from ssmprune_cli.data.datasets import ImageDataset, check_folder, subfolders
from ssmprune_cli.data.imagefolder import labelled_folders
from ssmprune_cli.data.npz import NpzImages
from ssmprune_cli.errors import DataError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_RECORD = 1 + 3 * 32 * 32  # label, then the red, green and blue planes by rows
_LAYOUTS = (
    "Expected cifar-10-batches-bin/test_batch.bin (cifar-10-binary.tar.gz of "
    "https://www.cs.toronto.edu/~kriz/cifar.html), folders named by class, test/ or val/ with such folders, or an .npz."
)


class Cifar10Binary(ImageDataset):
    """The records of the "binary version", held in memory."""

    def __init__(self, path: Path) -> None:
        try:
            content = np.fromfile(path, dtype=np.uint8)
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}", where=str(path)) from error
        if len(content) == 0 or len(content) % _RECORD:
            raise DataError(f"has {len(content)} bytes, no multiple of {_RECORD}: it is damaged", where=str(path))
        self._records = content.reshape(-1, _RECORD)
        wrong = np.flatnonzero(self._records[:, 0] >= len(CLASSES))
        if len(wrong):
            label = self._records[wrong[0], 0]
            raise DataError(f"record {wrong[0]} has the label {label}, not 0 to 9: it is damaged", where=str(path))

    def __len__(self) -> int:
        return len(self._records)

    def image(self, index: int) -> Image.Image:
        planes = self._records[index, 1:].reshape(3, 32, 32)
        return Image.fromarray(np.ascontiguousarray(planes.transpose(1, 2, 0)))

    def label(self, index: int) -> int:
        return int(self._records[index, 0])

    def name(self, index: int) -> str:
        return f"test_batch[{index}]"

    @property
    def class_names(self) -> tuple[str, ...]:
        return CLASSES


def open_cifar10(root: Path) -> ImageDataset:
    """The test images in `root`. Raises DataError for the Python version (a pickle) and for unknown layouts."""
    if root.suffix == ".npz":
        return NpzImages(root, CLASSES)
    check_folder(root)
    for folder in (root / "cifar-10-batches-bin", root):
        if (folder / "test_batch.bin").is_file():
            return Cifar10Binary(folder / "test_batch.bin")
    for folder in (root / "test", root / "val", root):
        if folder.is_dir() and {path.name for path in subfolders(folder)} & set(CLASSES):
            return _class_folders(folder)
    for folder in (root / "cifar-10-batches-py", root):
        if (folder / "test_batch").is_file():
            raise DataError(
                "is the Python version of CIFAR-10, a pickle, which can run code when it is read",
                where=str(folder / "test_batch"),
                hint="Use the binary version: cifar-10-binary.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html.",
            )
    raise DataError("has no CIFAR-10 test set", where=str(root), hint=_LAYOUTS)


def _class_folders(folder: Path) -> ImageDataset:
    index = {name: number for number, name in enumerate(CLASSES)}
    unknown = [path.name for path in subfolders(folder) if path.name not in index]
    if unknown:
        raise DataError(f"{unknown[0]!r} is no class of CIFAR-10", where=str(folder), hint=", ".join(CLASSES))
    return labelled_folders(folder, index, list(CLASSES))
