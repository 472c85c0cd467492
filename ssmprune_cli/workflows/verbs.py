"""`compress` and `repair` as Python calls them: their images may also be a folder, or files."""

from __future__ import annotations

import functools
import inspect
import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from ssmprune_cli import pruning
from ssmprune_cli.data import ImageDataset, Subset, listed_images
from ssmprune_cli.errors import UsageError
from ssmprune_cli.models import Backbone
from ssmprune_cli.recipe import CalibrationPlan
from ssmprune_cli.tasks import TASKS
from ssmprune_cli.workflows.trials import Prepared

P = ParamSpec("P")
R = TypeVar("R")

MOST_IMAGES = CalibrationPlan().images  # of a folder


def _reads_files(verb: Callable[P, R], place: str) -> Callable[P, R]:
    """`verb`, whose argument `place` may also be a path or a list of paths: see `from_files`."""
    signature = inspect.signature(verb)

    @functools.wraps(verb)
    def run(*arguments: P.args, **options: P.kwargs) -> R:
        bound = signature.bind(*arguments, **options)
        model, images = bound.arguments["model"], bound.arguments.get(place)
        if isinstance(model, Backbone) and _are_files(images):
            if bound.arguments.get("dense") is not None and not isinstance(images, list | tuple):
                raise UsageError(
                    "`dense` has the logits of images in their order, and those of a folder are in none",
                    where=place,
                    hint="Give a list of files, or the images as a tensor.",
                )
            bound.arguments[place] = from_files(model, images, bound.arguments.get("seed", 0))
        return verb(*bound.args, **bound.kwargs)

    return run


def _are_files(images: object) -> bool:
    first = images[0] if isinstance(images, list | tuple) and images else images
    return isinstance(first, str | os.PathLike)


def from_files(model: Backbone, images: Any, seed: int = 0) -> Prepared:
    """Batches of images on the disk, prepared as `model` expects them and read anew each time.

    images  a folder, a tree of folders, an .npz, a .txt with a path in each line, or one image: of more than
            MOST_IMAGES as many, chosen by `seed`. Or a list of files: all of them, in their order

    Raises DataError naming what cannot be read, and UsageError for a list that holds something else than paths.
    """
    dataset: ImageDataset
    if isinstance(images, list | tuple):
        odd = next((each for each in images if not isinstance(each, str | os.PathLike)), None)
        if odd is not None:
            raise UsageError(f"a list of files holds a value of type {type(odd).__name__}")
        dataset = listed_images([Path(each).expanduser() for each in images])
    else:
        dataset = TASKS.get(model.task).calibration(model, Path(images).expanduser(), MOST_IMAGES, seed)
        # A tree of folders comes class by class, and of batches the first ones settle the alignment.
        order = random.Random(seed).sample(range(len(dataset)), len(dataset))
        dataset = Subset(dataset, order)
    for note in dataset.notes:
        warnings.warn(note, stacklevel=4)
    return Prepared(model, dataset, TASKS.get(model.task).at_once(64))


compress = _reads_files(pruning.compress, "calibration")
repair = _reads_files(pruning.repair, "images")
