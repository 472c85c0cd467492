"""Images in one NumPy archive: `images` and `labels`, or MedMNIST's arrays for each split."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray
from PIL import Image

from ssmprune_cli.data.datasets import SPLIT_FOLDERS, ImageDataset, Split
from ssmprune_cli.data.image_file import check_pixels
from ssmprune_cli.errors import DataError, listing, shown
from ssmprune_cli.files import open_regular

_HINT = (
    "An .npz of images has `images`, uint8 (N, H, W) or (N, H, W, 3), and may have `labels`, integers (N,); or such "
    "arrays for each split, as MedMNIST has them: `train_images`, `train_labels`, `test_images` ..."
)
# A packed array may be this large; a larger one only up to so many times its packed size. Real images pack 10 times.
_MOST_BYTES, _MOST_RATIO = 1 << 30, 50
_MOST_CLASSES = 1 << 31


class NpzImages(ImageDataset):
    """`images` uint8 (N, H, W) grey or (N, H, W, 3) RGB, and, optionally, `labels` integers (N,), held in memory.

    A grey image may have an axis of one channel, labels one of one column. In an archive with arrays for each split,
    those of `split` are read, and a note says which. `class_names` are stated by the caller, as the archive has none.
    """

    def __init__(self, path: Path, split: Split, class_names: tuple[str, ...] = ()) -> None:
        where = str(path)
        arrays, self._key, self._notes = _read(path, split)
        images, labels = arrays[self._key], arrays.get(self._key.replace("images", "labels"))
        if images.ndim == 4 and images.shape[3] == 1:
            images = images[..., 0]
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] != 3):
            raise DataError(f"`{self._key}` is {images.dtype} {images.shape}", where=where, hint=_HINT)
        if images.size == 0:
            raise DataError("has no images", where=where)
        try:
            check_pixels(images.shape[2], images.shape[1])
        except ValueError as error:
            raise DataError(str(error), where=where) from error
        self._images = images
        self._labels = None if labels is None else _class_indices(labels, len(images), where)
        self._class_names = class_names

    def __len__(self) -> int:
        return len(self._images)

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self._images[index])

    def target(self, index: int) -> int | None:
        return None if self._labels is None else int(self._labels[index])

    def name(self, index: int) -> str:
        return f"{self._key}[{index}]"

    @property
    def class_names(self) -> tuple[str, ...]:
        return self._class_names

    @property
    def notes(self) -> tuple[str, ...]:
        return self._notes


def open_npz(path: Path, split: Split) -> NpzImages:
    """The images in `path`. An archive that is not divided is both splits."""
    return NpzImages(path, split)


def _class_indices(labels: NDArray[Any], count: int, where: str) -> NDArray[np.int64]:
    """(N,) of integers (N,) or (N, 1)."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        several = ": several labels an image are not read" if labels.ndim == 2 and labels.shape[0] == count else ""
        raise DataError(
            f"`labels` is {labels.dtype} {labels.shape} for {count} images{several}", where=where, hint=_HINT
        )
    if int(labels.max()) >= _MOST_CLASSES or int(labels.min()) < -_MOST_CLASSES:
        raise DataError(f"`labels` has {labels.max()}, which is no class", where=where)
    return labels.astype(np.int64)


def _read(path: Path, split: Split) -> tuple[dict[str, NDArray[Any]], str, tuple[str, ...]]:
    """The images and labels of `split` by name, the name of the images, and notes. Runs no code from the file."""
    with open_regular(path, DataError) as file:
        try:
            if file.read(6) == npy.MAGIC_PREFIX:
                raise DataError("is a single array, not an .npz", where=str(path), hint=_HINT)
            with zipfile.ZipFile(file) as archive:
                names = {name.removesuffix(".npy") for name in archive.namelist()}
                key, notes = _choose(path, names, split)
                wanted = [name for name in (key, key.replace("images", "labels")) if name in names]
                return {name: _array(archive, name, path) for name in wanted}, key, notes
        except DataError:
            raise
        except Exception as error:  # zipfile, zlib and NumPy raise almost anything on damaged files
            reason = "there is not enough memory" if isinstance(error, MemoryError) else shown(str(error))
            raise DataError(f"cannot be read: {reason}", where=str(path), hint=_HINT) from error


def _choose(path: Path, names: set[str], split: Split) -> tuple[str, tuple[str, ...]]:
    """The name of the images of `split`, and a note if the archive has others."""
    others = sorted(name for name in names if name.endswith("_images"))
    if "images" in names:
        note = f"{path}: `images` is read, and not {listing(others)}."
        return "images", (note,) if others else ()
    for part in SPLIT_FOLDERS[split]:
        if f"{part}_images" in names:
            return f"{part}_images", (f"{path}: of {listing(others)}, `{part}_images` is read.",)
    present = f", only {listing(sorted(names))}" if names else ""
    raise DataError(f"has no array `images`{present}", where=str(path), hint=_HINT)


def _array(archive: zipfile.ZipFile, name: str, path: Path) -> NDArray[Any]:
    """One array, after its header has shown that it is plain numbers and not too large."""
    member = archive.getinfo(f"{name}.npy")
    if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        what = "is encrypted" if member.flag_bits & 1 else "is packed in a way that NumPy does not use"
        raise DataError(what, where=str(path), hint="Unpack it and save it again with numpy.savez.")
    with archive.open(member) as content:
        version = npy.read_magic(content)
        header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = header(content)
    size = math.prod(shape) * dtype.itemsize
    if dtype.hasobject or dtype.kind not in "uifb":
        raise DataError(f"`{name}` holds {dtype}, not numbers", where=str(path), hint=_HINT)
    if any(length < 0 for length in shape) or size > member.file_size:
        raise DataError(f"`{name}` says that it is {shape}, more than the file has: it is damaged", where=str(path))
    packed = min(member.compress_size, path.stat().st_size)  # what the archive says may be too much
    if size > max(_MOST_BYTES, _MOST_RATIO * packed):
        raise DataError(
            f"`{name}` has {size:,} bytes, packed in {packed:,}: too many to be images",
            where=str(path),
            hint="Save it with numpy.savez, which does not pack.",
        )
    with archive.open(member) as content:
        array: NDArray[Any] = npy.read_array(content, allow_pickle=False)
    return array
