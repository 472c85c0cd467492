"""CIFAR-10 and CIFAR-100, in layouts that can be read without running code."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ssmprune_cli.data.datasets import SPLIT_FOLDERS, ImageDataset, Split
from ssmprune_cli.data.files import check_folder, first_file, read_lines, subfolders
from ssmprune_cli.data.imagefolder import labelled_folders
from ssmprune_cli.data.npz import NpzImages
from ssmprune_cli.errors import DataError, shown
from ssmprune_cli.files import read_bytes

_PIXELS = 3 * 32 * 32  # the red, green and blue planes by rows
_MOST_BYTES = 1 << 30  # of one file; the largest has 154 MB
_PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"


@dataclass(frozen=True)
class _Kind:
    """labels  bytes before the pixels of a record; the last one is the class.
    files      of the binary version, by split; python_files are those of the Python version
    """

    name: str
    classes: tuple[str, ...]
    labels: int
    files: dict[Split, tuple[str, ...]]
    python_files: dict[Split, str]
    archive: str  # of the binary version
    class_list: str  # the file of its class names

    @property
    def folders(self) -> tuple[str, str]:
        """Of the binary and of the Python version, as their archives have them."""
        if self.name == "CIFAR-10":
            return "cifar-10-batches-bin", "cifar-10-batches-py"
        return "cifar-100-binary", "cifar-100-python"


CIFAR10 = _Kind(
    "CIFAR-10",
    ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    1,
    {"train": tuple(f"data_batch_{number}.bin" for number in range(1, 6)), "val": ("test_batch.bin",)},
    {"train": "data_batch_1", "val": "test_batch"},
    "cifar-10-binary.tar.gz",
    "batches.meta.txt",
)
CIFAR100 = _Kind(
    "CIFAR-100",
    tuple(resources.files("ssmprune_cli.data").joinpath("cifar100_classes.txt").read_text("ascii").split()),
    2,  # the coarse label, then the fine one
    {"train": ("train.bin",), "val": ("test.bin",)},
    {"train": "train", "val": "test"},
    "cifar-100-binary.tar.gz",
    "fine_label_names.txt",
)


class CifarBinary(ImageDataset):
    """The records of the files `paths` of the "binary version", held in memory."""

    def __init__(self, paths: list[Path], kind: _Kind) -> None:
        records = [_records(path, kind) for path in paths]
        self._records = np.concatenate(records)
        self._kind = kind
        self._names = [
            f"{path.stem}[{number}]" for path, found in zip(paths, records, strict=True) for number in range(len(found))
        ]

    def __len__(self) -> int:
        return len(self._records)

    def image(self, index: int) -> Image.Image:
        planes = self._records[index, self._kind.labels :].reshape(3, 32, 32)
        return Image.fromarray(np.ascontiguousarray(planes.transpose(1, 2, 0)))

    def target(self, index: int) -> int:
        return int(self._records[index, self._kind.labels - 1])

    def name(self, index: int) -> str:
        return self._names[index]

    @property
    def class_names(self) -> tuple[str, ...]:
        return self._kind.classes


def _records(path: Path, kind: _Kind) -> NDArray[np.uint8]:
    """(N, labels + pixels) records of one file."""
    size = kind.labels + _PIXELS
    content = np.frombuffer(read_bytes(path, _MOST_BYTES, DataError), dtype=np.uint8)
    if len(content) == 0 or len(content) % size:
        raise DataError(f"has {len(content)} bytes, no multiple of {size}: it is damaged", where=str(path))
    records = content.reshape(-1, size)
    wrong = np.flatnonzero(records[:, kind.labels - 1] >= len(kind.classes))
    if len(wrong):
        label = records[wrong[0], kind.labels - 1]
        raise DataError(
            f"record {wrong[0]} has the label {label}, not 0 to {len(kind.classes) - 1}: it is damaged, or not of "
            f"{kind.name}",
            where=str(path),
        )
    return records


def open_cifar10(root: Path, split: Split) -> ImageDataset:
    """The images of `split` ("val": the test set) of CIFAR-10 in `root`.

    Raises DataError for the Python version (a pickle), for a missing file and for unknown layouts.
    """
    return _open(root, split, CIFAR10)


def open_cifar100(root: Path, split: Split) -> ImageDataset:
    """As `open_cifar10`, for CIFAR-100 with its 100 fine classes."""
    return _open(root, split, CIFAR100)


def _open(root: Path, split: Split, kind: _Kind) -> ImageDataset:
    if root.suffix == ".npz":
        return NpzImages(root, split, kind.classes)
    check_folder(root)
    binary, python = kind.folders
    for folder in (root / binary, root):
        if any((folder / name).exists() for names in kind.files.values() for name in names):
            _check_class_list(folder, kind)
            return CifarBinary([folder / name for name in kind.files[split]], kind)
    for folder in (root / python, root):
        first = folder / kind.python_files[split]
        if first.is_file():
            raise DataError(
                f"is the Python version of {kind.name}, a pickle, which can run code when it is read",
                where=str(first),
                hint=f"Use the binary version: {kind.archive} of {_PAGE}.",
            )
    for folder in (*(root / name for name in SPLIT_FOLDERS[split]), root):
        if folder.is_dir() and {path.name for path in subfolders(folder)} & set(kind.classes):
            return _class_folders(folder, kind)
    raise DataError(
        f"has no {kind.name} in a known layout",
        where=str(root),
        hint=f"Expected {binary}/ with {', '.join(kind.files[split])} ({kind.archive} of {_PAGE}), folders named by "
        f"class, {'/, '.join(SPLIT_FOLDERS[split])}/ with such folders, or an .npz.",
    )


def _check_class_list(folder: Path, kind: _Kind) -> None:
    """Raises DataError if the list beside the images has the classes in another order."""
    path = first_file(kind.class_list, [folder])
    if path is None:
        return
    names = [line.strip() for line in read_lines(path) if line.strip()]
    if tuple(names) != kind.classes:
        at = next(
            (i for i, pair in enumerate(zip(names, kind.classes, strict=False)) if pair[0] != pair[1]), len(names)
        )
        raise DataError(
            f"does not list the {len(kind.classes)} classes of {kind.name} in their order: it differs from line "
            f"{at + 1} on",
            where=str(path),
        )


def _class_folders(folder: Path, kind: _Kind) -> ImageDataset:
    index = {name: number for number, name in enumerate(kind.classes)}
    unknown = [path.name for path in subfolders(folder) if path.name not in index]
    if unknown:
        raise DataError(
            f"{shown(unknown[0])!r} is no class of {kind.name}", where=str(folder), hint=", ".join(kind.classes)
        )
    return labelled_folders(folder, index, list(kind.classes))
