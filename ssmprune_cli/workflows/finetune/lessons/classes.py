"""The class of an image: random crops, distortions, pairs that are mixed; soft-target cross-entropy."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from ssmprune_cli.data import ImageDataset
from ssmprune_cli.errors import DataError, UsageError
from ssmprune_cli.models import Backbone
from ssmprune_cli.preprocessing import Preprocessing
from ssmprune_cli.recipe import Training
from ssmprune_cli.workflows.finetune.augment import mix, soft_targets, training_image
from ssmprune_cli.workflows.finetune.lessons.lesson import Lesson, Pupil


class ClassLesson(Lesson):
    """Targets are probabilities (b, classes)."""

    def check(self, model: Backbone, images: ImageDataset, settings: Training) -> None:
        if len(images) == 0:
            raise DataError("there are no images")
        if model.num_classes < 2:
            raise UsageError(f"the model has {model.num_classes} classes: training needs two or more to tell apart")
        for index in range(len(images)):
            label = images.target(index)
            if not isinstance(label, int):
                raise DataError("has no label", where=images.name(index))
            if not 0 <= label < model.num_classes:
                raise DataError(
                    f"has the label {label}, and the model has {model.num_classes} classes "
                    f"(0 to {model.num_classes - 1})",
                    where=images.name(index),
                )

    def example(
        self, image: Image.Image, target: object, name: str, pupil: Pupil, settings: Training, seed: int
    ) -> tuple[Tensor, Tensor]:
        assert isinstance(pupil.way, Preprocessing) and isinstance(target, int)  # by check
        pixels = training_image(image, pupil.way, settings, seed)
        return pixels, soft_targets(torch.tensor(target), pupil.classes, settings.label_smoothing)

    def together(self, images: Tensor, targets: Tensor, settings: Training, seeds: list[int]) -> tuple[Tensor, Tensor]:
        return mix(images, targets, settings, seeds) if settings.mixup or settings.cutmix else (images, targets)

    def loss(self, logits: Tensor, targets: Tensor, settings: Training) -> Tensor:
        return functional.cross_entropy(logits, targets)

    def rows(self, logits: Tensor) -> Tensor:
        return logits
