"""What a lesson is: how the images of a task become examples, and what is minimised."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from ssmprune_cli.data import ImageDataset
from ssmprune_cli.models import Backbone
from ssmprune_cli.preprocessing import KeepRatio, Preprocessing
from ssmprune_cli.recipe import Training


@dataclass(frozen=True)
class Pupil:
    """What an example has to fit: how the model takes images, their height and width, and how many classes it has."""

    way: Preprocessing | KeepRatio
    size: tuple[int, int]
    classes: int


class Lesson(ABC):
    """Everything random is a function of seeds."""

    @abstractmethod
    def check(self, model: Backbone, images: ImageDataset, settings: Training) -> None:
        """Raises DataError for images, UsageError for settings, that `model` cannot be trained with."""

    @abstractmethod
    def example(
        self, image: Image.Image, target: object, name: str, pupil: Pupil, settings: Training, seed: int
    ) -> tuple[Tensor, Tensor]:
        """A normalised image (3, H, W) and what it is to be answered with. ValueError for an image that cannot be
        prepared, DataError, calling it `name`, for a target that does not fit."""

    def together(self, images: Tensor, targets: Tensor, settings: Training, seeds: list[int]) -> tuple[Tensor, Tensor]:
        """Examples as they are trained with, (b, 3, H, W) and (b, ...); `seeds` has one for each pair."""
        return images, targets

    @abstractmethod
    def loss(self, logits: Tensor, targets: Tensor, settings: Training) -> Tensor:
        """How far logits (b, classes, ...) in float32 are from the targets: a mean."""

    @abstractmethod
    def rows(self, logits: Tensor) -> Tensor:
        """Logits (b, classes, ...) as (n, classes): each row is an answer that a teacher has one for."""
