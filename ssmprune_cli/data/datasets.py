"""What a dataset of images is, and the parts that several kinds share: images in files, and a choice of images."""

from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from PIL import Image
from torch import Tensor

from ssmprune_cli.data.image_file import read_image
from ssmprune_cli.data.preprocess import prepare_image
from ssmprune_cli.errors import DataError, shown
from ssmprune_cli.preprocessing import Frame, Preparation, of_images

Split = Literal["train", "val"]
Target = object
"""What an image is judged by, None if that is not known. Its task knows more: an int is a class; a uint8 array (H, W),
of the size of the image turned upright, has a class for each pixel, 255 where none is judged; a tuple of ints are the
tokens that follow those of a window of text."""
_LONGEST_NAME = 4096  # characters, as of a path
SPLIT_FOLDERS: dict[Split, tuple[str, ...]] = {"train": ("train",), "val": ("val", "validation", "test")}


class ImageDataset(ABC):
    """Images by index, with targets or without; or clips, or windows of text. Reading is safe from several threads.

    clips  whether these are clips, of which a model is given several frames
    """

    clips: bool = False

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """The decoded image, in any mode. Raises DataError naming it if it cannot be read."""

    @abstractmethod
    def target(self, index: int) -> Target:
        """What its answer is judged by. Raises DataError naming its file if it cannot be read or does not fit."""

    @abstractmethod
    def name(self, index: int) -> str:
        """What to call the image in messages; does not depend on where the dataset lies."""

    def prepared(self, index: int, way: Preparation) -> tuple[Tensor, Frame]:
        """What a model that is prepared for in this `way` takes: (3, H, W) float32, and where the image lies in it; of
        clips (3, T, H, W), or with several views (views, 3, T, H, W)."""
        image = self.image(index)
        try:
            return prepare_image(image, of_images(way))
        except (ValueError, OSError, MemoryError) as error:
            raise unprepared(error, self.name(index)) from error

    def content(self, index: int) -> bytes:
        """SHA-256 of what it shows: mode, size and pixels."""
        image = self.image(index)
        return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).digest()

    def mark(self, index: int) -> str | int | None:
        """What stands for the image's target where datasets are told apart: equal for equal targets, None for none."""
        target = self.target(index)
        return target if isinstance(target, int | None) else hashlib.sha256(repr(target).encode()).hexdigest()

    @property
    def has_targets(self) -> bool:
        """Whether every image has a target."""
        return all(self.target(index) is not None for index in range(len(self)))

    @property
    def num_classes(self) -> int | None:
        """Number of classes that the targets are about, None if the dataset does not say."""
        return len(self.class_names) or None

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names by class index; empty if the dataset has none."""
        return ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of how it was read: the order of the classes if others are possible, what is left
        out, classes without images."""
        return ()


def unprepared(error: Exception, name: str) -> DataError:
    """What to raise for an image that was read, and cannot be made what a model expects."""
    reason = "there is not enough memory" if isinstance(error, MemoryError) else str(error)
    return DataError(f"cannot be prepared for the model: {reason}", where=name)


class ImageFiles(ImageDataset):
    """Image files below `root`. `labels` has one class index a file, or is None."""

    def __init__(
        self,
        root: Path,
        files: Sequence[Path],
        labels: Sequence[int] | None,
        class_names: Iterable[str] = (),
        notes: Iterable[str] = (),
    ) -> None:
        self._root = root
        self._files = files
        self._labels = labels
        self._class_names = tuple(shown(name) for name in class_names)
        self._notes = tuple(notes)

    def __len__(self) -> int:
        return len(self._files)

    def image(self, index: int) -> Image.Image:
        return read_image(self._files[index])

    def target(self, index: int) -> Target:
        return None if self._labels is None else self._labels[index]

    def name(self, index: int) -> str:
        return shown(self._files[index].relative_to(self._root).as_posix(), _LONGEST_NAME)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self._class_names

    @property
    def notes(self) -> tuple[str, ...]:
        return self._notes


class Subset(ImageDataset):
    """The images of `dataset` at `indices`, in that order."""

    def __init__(self, dataset: ImageDataset, indices: Sequence[int]) -> None:
        self._dataset = dataset
        self._indices = indices
        self.clips = dataset.clips

    def __len__(self) -> int:
        return len(self._indices)

    def image(self, index: int) -> Image.Image:
        return self._dataset.image(self._indices[index])

    def target(self, index: int) -> Target:
        return self._dataset.target(self._indices[index])

    def name(self, index: int) -> str:
        return self._dataset.name(self._indices[index])

    def prepared(self, index: int, way: Preparation) -> tuple[Tensor, Frame]:
        return self._dataset.prepared(self._indices[index], way)

    def content(self, index: int) -> bytes:
        return self._dataset.content(self._indices[index])

    def mark(self, index: int) -> str | int | None:
        return self._dataset.mark(self._indices[index])

    @property
    def has_targets(self) -> bool:
        return self._dataset.has_targets

    @property
    def num_classes(self) -> int | None:
        return self._dataset.num_classes

    @property
    def class_names(self) -> tuple[str, ...]:
        return self._dataset.class_names

    @property
    def notes(self) -> tuple[str, ...]:
        return self._dataset.notes


def chosen(dataset: ImageDataset, count: int, seed: int) -> ImageDataset:
    """`count` of them by `seed`, in their order; all if there are no more."""
    if count >= len(dataset):
        return dataset
    return Subset(dataset, sorted(random.Random(seed).sample(range(len(dataset)), count)))


class Joined(ImageDataset):
    """The images of several datasets one after the other, without targets."""

    def __init__(self, datasets: Sequence[ImageDataset]) -> None:
        self._datasets = datasets
        self._places = [(dataset, index) for dataset in datasets for index in range(len(dataset))]

    def __len__(self) -> int:
        return len(self._places)

    def image(self, index: int) -> Image.Image:
        dataset, place = self._places[index]
        return dataset.image(place)

    def target(self, index: int) -> Target:
        return None

    def name(self, index: int) -> str:
        dataset, place = self._places[index]
        return dataset.name(place)

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(note for dataset in self._datasets for note in dataset.notes)
