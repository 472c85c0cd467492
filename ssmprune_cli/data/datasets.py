"""What a dataset of images is, and the parts that several kinds share: images in files, and a choice of images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from PIL import Image

from ssmprune_cli.errors import DataError

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})

Split = Literal["train", "val"]
SPLIT_FOLDERS: dict[Split, tuple[str, ...]] = {"train": ("train",), "val": ("val", "validation", "test")}


class ImageDataset(ABC):
    """Images by index, labelled or not. Reading is safe from several threads."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """The decoded image, in any mode. Raises DataError naming it if it cannot be read."""

    @abstractmethod
    def label(self, index: int) -> int | None:
        """Its class index, None if the images are not labelled."""

    @abstractmethod
    def name(self, index: int) -> str:
        """What to call the image in messages; does not depend on where the dataset lies."""

    @property
    def num_classes(self) -> int | None:
        """Number of classes that the labels are about, None if the dataset does not say."""
        return len(self.class_names) or None

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names by class index; empty if the dataset has none."""
        return ()


class ImageFiles(ImageDataset):
    """Image files below `root`. `labels` has one class index a file, or is None."""

    def __init__(
        self, root: Path, files: Sequence[Path], labels: Sequence[int] | None, class_names: Iterable[str] = ()
    ) -> None:
        self._root = root
        self._files = files
        self._labels = labels
        self._class_names = tuple(class_names)

    def __len__(self) -> int:
        return len(self._files)

    def image(self, index: int) -> Image.Image:
        path = self._files[index]
        try:
            with Image.open(path) as image:
                check_pixels(*image.size)
                image.load()
                return image
        except Exception as error:  # PIL's decoders raise almost anything on damaged files
            raise DataError(f"cannot be read as an image: {error}", where=str(path)) from error

    def label(self, index: int) -> int | None:
        return None if self._labels is None else self._labels[index]

    def name(self, index: int) -> str:
        return self._files[index].relative_to(self._root).as_posix()

    @property
    def class_names(self) -> tuple[str, ...]:
        return self._class_names


class Subset(ImageDataset):
    """The images of `dataset` at `indices`, in that order."""

    def __init__(self, dataset: ImageDataset, indices: Sequence[int]) -> None:
        self._dataset = dataset
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def image(self, index: int) -> Image.Image:
        return self._dataset.image(self._indices[index])

    def label(self, index: int) -> int | None:
        return self._dataset.label(self._indices[index])

    def name(self, index: int) -> str:
        return self._dataset.name(self._indices[index])

    @property
    def num_classes(self) -> int | None:
        return self._dataset.num_classes

    @property
    def class_names(self) -> tuple[str, ...]:
        return self._dataset.class_names


class Joined(ImageDataset):
    """The images of several datasets one after the other, without labels."""

    def __init__(self, datasets: Sequence[ImageDataset]) -> None:
        self._places = [(dataset, index) for dataset in datasets for index in range(len(dataset))]

    def __len__(self) -> int:
        return len(self._places)

    def image(self, index: int) -> Image.Image:
        dataset, place = self._places[index]
        return dataset.image(place)

    def label(self, index: int) -> int | None:
        return None

    def name(self, index: int) -> str:
        dataset, place = self._places[index]
        return dataset.name(place)


def check_pixels(width: int, height: int) -> None:
    """Raises ValueError for more pixels than PIL holds to be safe: it only warns up to twice as many."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise ValueError(f"{width} x {height} pixels are more than the limit of {limit:,}")


def image_files(folder: Path) -> list[Path]:
    """Every image file (by its suffix) in `folder` and below, sorted by path, hidden files and folders left out.

    Links are followed, each folder is read once. Raises DataError for a folder that cannot be read.
    """
    return sorted(_walk(folder, set()), key=lambda path: path.relative_to(folder).parts)


def subfolders(folder: Path) -> list[Path]:
    """The folders in `folder`, sorted by name, hidden ones left out."""
    return sorted(
        (path for path in folder.iterdir() if path.is_dir() and not _hidden(path)), key=lambda path: path.name
    )


def check_folder(folder: Path) -> None:
    """Raises DataError unless `folder` is a folder."""
    if not folder.is_dir():
        raise DataError("is not a folder" if folder.exists() else "does not exist", where=str(folder))


def _walk(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """`seen` has the folders that were read, links resolved: a link to a folder above would give its images again."""
    if folder.resolve() in seen:
        return
    seen.add(folder.resolve())
    try:
        paths = sorted(folder.iterdir())  # sorted: with two ways to a folder, always the same one is taken
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=str(folder)) from error
    for path in paths:
        if _hidden(path):
            continue
        if path.is_dir():
            yield from _walk(path, seen)
        elif path.suffix.lower() in IMAGE_SUFFIXES:
            yield path


def _hidden(path: Path) -> bool:
    return path.name.startswith(".")
