"""The class of every pixel: image and mask are cropped, resized and mirrored together; cross-entropy of the pixels that
the mask judges."""

from __future__ import annotations

import random

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional

from ssmprune_cli.data import NOT_JUDGED, ImageDataset, in_colour, normalised
from ssmprune_cli.errors import DataError, UsageError
from ssmprune_cli.models import Backbone
from ssmprune_cli.preprocessing import KeepRatio
from ssmprune_cli.recipe import Training
from ssmprune_cli.tasks import TASKS, fitting
from ssmprune_cli.workflows.finetune.augment import crop_box, jittered
from ssmprune_cli.workflows.finetune.lessons.lesson import Lesson, Pupil

_ALONE = ("shift", "randaugment", "erasing", "mixup", "cutmix")  # settings that say nothing of a mask


class PixelLesson(Lesson):
    """Targets are masks (b, H, W), int64, of the size that the model's tokens are counted for."""

    def check(self, model: Backbone, images: ImageDataset, settings: Training) -> None:
        if len(images) == 0:
            raise DataError("there are no images")
        TASKS.get(model.task).check(model, images)
        for name in _ALONE:
            if getattr(settings, name):
                raise UsageError(
                    f"training.{name} is for images of one class: nothing says what becomes of a mask",
                    hint=f"Give `--set training.{name}=0`.",
                )

    def example(
        self, image: Image.Image, target: object, name: str, pupil: Pupil, settings: Training, seed: int
    ) -> tuple[Tensor, Tensor]:
        assert isinstance(pupil.way, KeepRatio)  # by the model's task
        draw = random.Random(seed)
        image = in_colour(image, pupil.way)
        mask = Image.fromarray(fitting(target, (image.height, image.width), pupil.classes, name))
        height, width = pupil.size
        box = _box(image, pupil, settings, draw)
        picture = image.resize((width, height), Image.Resampling.BILINEAR, box=box)
        classes = mask.resize((width, height), Image.Resampling.NEAREST, box=box)
        if settings.flip and draw.random() < 0.5:
            picture, classes = ImageOps.mirror(picture), ImageOps.mirror(classes)
        picture = jittered(picture, settings.colour_jitter, draw)
        pixels = torch.from_numpy(normalised(picture, pupil.way))
        return pixels, torch.from_numpy(np.asarray(classes).astype(np.int64))

    def loss(self, logits: Tensor, targets: Tensor, settings: Training) -> Tensor:
        total = functional.cross_entropy(
            logits, targets, ignore_index=NOT_JUDGED, label_smoothing=settings.label_smoothing, reduction="sum"
        )
        return total / (targets != NOT_JUDGED).sum().clamp(min=1)

    def rows(self, logits: Tensor) -> Tensor:
        """(pixels, classes)"""
        return logits.movedim(1, -1).flatten(0, -2)


def _box(
    image: Image.Image, pupil: Pupil, settings: Training, draw: random.Random
) -> tuple[float, float, float, float]:
    """What is cut out of an image, in its pixels: a random part (`crop_scale`), or as much as the model sees of the
    prepared image in its own size, somewhere."""
    height, width = pupil.size
    if settings.crop_scale is not None:
        box = crop_box(image.size, settings.crop_scale, draw, width / height)
        if box is not None:
            return box
    assert isinstance(pupil.way, KeepRatio)
    scale = min(pupil.way.long / max(image.size), pupil.way.short / min(image.size))
    w, h = min(image.width, width / scale), min(image.height, height / scale)
    left, top = draw.uniform(0, image.width - w), draw.uniform(0, image.height - h)
    return left, top, left + w, top + h
