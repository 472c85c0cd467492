"""`compress` and `repair` as Python calls them: images may also be a folder, or files; models may be anybody's."""

from __future__ import annotations

import functools
import inspect
import os
import random
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, overload

from torch import Tensor, nn

from ssmprune_cli import adapt, pruning
from ssmprune_cli.adapt import Compressed
from ssmprune_cli.data import ImageDataset, Subset
from ssmprune_cli.errors import UsageError
from ssmprune_cli.models import Backbone
from ssmprune_cli.pruning import Asked, Calibration, Images, Returning
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
    task = TASKS.get(model.task)
    if isinstance(images, list | tuple):
        odd = next((each for each in images if not isinstance(each, str | os.PathLike)), None)
        if odd is not None:
            raise UsageError(f"a list of files holds a value of type {type(odd).__name__}")
        dataset = task.listed([Path(each).expanduser() for each in images])
    else:
        dataset = task.calibration(model, Path(images).expanduser(), MOST_IMAGES, seed)
        # A tree of folders comes class by class, and of batches the first ones settle the alignment.
        order = random.Random(seed).sample(range(len(dataset)), len(dataset))
        dataset = Subset(dataset, order)
    for note in dataset.notes:
        warnings.warn(note, stacklevel=4)
    return Prepared(model, dataset, task.at_once(64))


_compress_backbone = _reads_files(pruning.compress, "calibration")


@overload
def compress(  # type: ignore[overload-overlap]
    model: Backbone,
    keep: float | Sequence[float] | None = None,
    *,
    tokens: Sequence[int] | None = None,
    points: Sequence[int] | None = None,
    importance: str = "clip",
    reduction: str = pruning.DEFAULT_REDUCTION,
    alignment: str = "auto",
    calibration: Images | None = None,
    dense: Tensor | None = None,
    repair: Asked = "auto",
    seed: int = 0,
    returning: Returning = "left",
) -> Calibration | None: ...


@overload
def compress(
    model: nn.Module,
    keep: float | Sequence[float] | None = None,
    *,
    calibration: object,
    tokens: Sequence[int] | None = None,
    points: Sequence[int] | None = None,
    importance: str = "clip",
    reduction: str | None = None,
    alignment: str = "auto",
    seed: int = 0,
    protect: Sequence[int] | None = None,
    tokenwise: Sequence[str] = (),
) -> Compressed: ...


def compress(
    model: nn.Module, keep: float | Sequence[float] | None = None, **options: Any
) -> Calibration | Compressed | None:
    """Make `model` drop tokens, in place; `restore` undoes it. The weights do not change.

    A backbone of ours drops them between blocks: see `pruning.compress`. A module of your own drops them inside its
    mixers, which are recognised by names and shapes and proven on random input: see docs/own_modules.md. Of both:

    keep         ratio of tokens kept *at each point*: one number or one a point; or `tokens` that stay there
    points       after how many blocks (mixers, in the order of their calls); by default a quarter, half and three
                 quarters of the longest stage
    importance, reduction, alignment, seed: names of the method, and the seed of a random score
    calibration  unlabelled inputs. Of a module of your own: a tensor, batches of them, (inputs, labels) as a loader
                 has, or dictionaries of arguments

    Options for a module of your own:

    protect      positions that always stay, negative ones from the end; by default those that the head reads, if these
                 are a few, and the last one if there is an answer for each token
    tokenwise    patterns of names, such as "layers.*.mlp": modules that see one token at a time, and then run on the
                 tokens that are left

    Options for a backbone of ours: `dense`, `repair`, `returning`.

    Returns what calibration saw. Raises UsageError for settings, inputs and modules that do not fit.
    """
    ours = hasattr(model, "pruner") and not isinstance(model, adapt.Adapter)
    refused = {"protect", "tokenwise"} if ours else {"dense", "repair", "returning"}
    for name in sorted(refused & set(options)):
        raise UsageError(
            f"`{name}` is for {'modules of your own' if ours else 'backbones of ours'}, and the model is a "
            f"{type(model).__name__}"
        )
    if ours:
        return _compress_backbone(model, keep, **options)  # type: ignore[arg-type]
    options.setdefault("calibration", None)
    return adapt.compress(model, keep, **options)


repair = _reads_files(pruning.repair, "images")
