"""Images in one NumPy archive."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ssmprune_cli.data.datasets import ImageDataset, Split
from ssmprune_cli.errors import DataError

_HINT = "An .npz of images has `images`, uint8 (N, H, W) or (N, H, W, 3), and may have `labels`, integers (N,)."


class NpzImages(ImageDataset):
    """`images` uint8 (N, H, W) grey or (N, H, W, 3) RGB, and, optionally, `labels` integers (N,), held in memory.

    `class_names` are given by the caller, as the archive has none.
    """

    def __init__(self, path: Path, class_names: tuple[str, ...] = ()) -> None:
        where = str(path)
        arrays = _read(path)
        images, labels = arrays.get("images"), arrays.get("labels")
        if images is None:
            raise DataError("has no array `images`", where=where, hint=_HINT)
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] != 3):
            raise DataError(f"`images` is {images.dtype} {images.shape}", where=where, hint=_HINT)
        if images.size == 0:
            raise DataError("has no images", where=where)
        if labels is not None and (labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer)):
            message = f"`labels` is {labels.dtype} {labels.shape} for {len(images)} images"
            raise DataError(message, where=where, hint=_HINT)
        self._images = images
        self._labels = labels
        self._class_names = class_names

    def __len__(self) -> int:
        return len(self._images)

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self._images[index])

    def label(self, index: int) -> int | None:
        return None if self._labels is None else int(self._labels[index])

    def name(self, index: int) -> str:
        return f"images[{index}]"

    @property
    def class_names(self) -> tuple[str, ...]:
        return self._class_names


def open_npz(path: Path, split: Split) -> NpzImages:
    """The images in `path`: an archive is not divided, so it is both splits."""
    return NpzImages(path)


def _read(path: Path) -> dict[str, NDArray[Any]]:
    """`images` and `labels` of the archive, as far as it has them. Runs no code from the file."""
    try:
        # Opened here: NumPy leaves a file open that it cannot read.
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DataError("is a single array, not an .npz", where=str(path), hint=_HINT)
            return {key: archive[key] for key in ("images", "labels") if key in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"cannot be read: {error}", where=str(path), hint=_HINT) from error
