"""CIFAR-10, in layouts that can be read without running code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ssmprune_cli.data.datasets import SPLIT_FOLDERS, ImageDataset, Split, check_folder, subfolders
from ssmprune_cli.data.imagefolder import labelled_folders
from ssmprune_cli.data.npz import NpzImages
from ssmprune_cli.errors import DataError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_RECORD = 1 + 3 * 32 * 32  # label, then the red, green and blue planes by rows
_BATCHES: dict[Split, tuple[str, ...]] = {
    "train": tuple(f"data_batch_{number}" for number in range(1, 6)),
    "val": ("test_batch",),
}
_LAYOUTS = (
    "Expected cifar-10-batches-bin/ with {} (cifar-10-binary.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html), "
    "folders named by class, {}/ with such folders, or an .npz."
)


class Cifar10Binary(ImageDataset):
    """The records of the files `paths` of the "binary version", held in memory."""

    def __init__(self, paths: list[Path]) -> None:
        records = [_records(path) for path in paths]
        self._records = np.concatenate(records)
        self._names = [
            f"{path.stem}[{number}]" for path, found in zip(paths, records, strict=True) for number in range(len(found))
        ]

    def __len__(self) -> int:
        return len(self._records)

    def image(self, index: int) -> Image.Image:
        planes = self._records[index, 1:].reshape(3, 32, 32)
        return Image.fromarray(np.ascontiguousarray(planes.transpose(1, 2, 0)))

    def label(self, index: int) -> int:
        return int(self._records[index, 0])

    def name(self, index: int) -> str:
        return self._names[index]

    @property
    def class_names(self) -> tuple[str, ...]:
        return CLASSES


def _records(path: Path) -> NDArray[np.uint8]:
    """(N, 3073) records of one file."""
    try:
        content = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=str(path)) from error
    if len(content) == 0 or len(content) % _RECORD:
        raise DataError(f"has {len(content)} bytes, no multiple of {_RECORD}: it is damaged", where=str(path))
    records = content.reshape(-1, _RECORD)
    wrong = np.flatnonzero(records[:, 0] >= len(CLASSES))
    if len(wrong):
        label = records[wrong[0], 0]
        raise DataError(f"record {wrong[0]} has the label {label}, not 0 to 9: it is damaged", where=str(path))
    return records


def open_cifar10(root: Path, split: Split) -> ImageDataset:
    """The images of `split` ("val": the test set) in `root`.

    Raises DataError for the Python version (a pickle), for a missing file and for unknown layouts.
    """
    if root.suffix == ".npz":
        return NpzImages(root, CLASSES)
    check_folder(root)
    for folder in (root / "cifar-10-batches-bin", root):
        if any(folder.glob("*_batch*.bin")):
            return Cifar10Binary([folder / f"{name}.bin" for name in _BATCHES[split]])
    for folder in (*(root / name for name in SPLIT_FOLDERS[split]), root):
        if folder.is_dir() and {path.name for path in subfolders(folder)} & set(CLASSES):
            return _class_folders(folder)
    for folder in (root / "cifar-10-batches-py", root):
        first = folder / _BATCHES[split][0]
        if first.is_file():
            raise DataError(
                "is the Python version of CIFAR-10, a pickle, which can run code when it is read",
                where=str(first),
                hint="Use the binary version: cifar-10-binary.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html.",
            )
    hint = _LAYOUTS.format(", ".join(f"{name}.bin" for name in _BATCHES[split]), "/, ".join(SPLIT_FOLDERS[split]))
    raise DataError("has no CIFAR-10 in a known layout", where=str(root), hint=hint)


def _class_folders(folder: Path) -> ImageDataset:
    index = {name: number for number, name in enumerate(CLASSES)}
    unknown = [path.name for path in subfolders(folder) if path.name not in index]
    if unknown:
        raise DataError(f"{unknown[0]!r} is no class of CIFAR-10", where=str(folder), hint=", ".join(CLASSES))
    return labelled_folders(folder, index, list(CLASSES))
