"""`compress` and `repair` as Python calls them: their images may also be a folder, or files."""

from __future__ import annotations

import functools
import inspect
import os
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

from torch import Tensor, nn

from ssmprune_cli import pruning
from ssmprune_cli.data import ImageDataset, Subset, calibration_images, listed_images
from ssmprune_cli.errors import UsageError
from ssmprune_cli.inference import prepare
from ssmprune_cli.interface import Pruner
from ssmprune_cli.models import Backbone
from ssmprune_cli.pruning import DEFAULT_REDUCTION, Asked, Calibration, Images, Returning, as_batches, few_images
from ssmprune_cli.recipe import CalibrationPlan
from ssmprune_cli.tasks import TASKS
from ssmprune_cli.workflows.eight_bits import refuse_eight_bits, to_eight_bits
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
        dataset = calibration_images(Path(images).expanduser(), MOST_IMAGES, seed)
        # A tree of folders comes class by class, and of batches the first ones settle the alignment.
        order = random.Random(seed).sample(range(len(dataset)), len(dataset))
        dataset = Subset(dataset, order)
    for note in dataset.notes:
        warnings.warn(note, stacklevel=4)
    return Prepared(model, dataset, TASKS.get(model.task).at_once(64))


def _compress(
    model: Backbone,
    keep: float | Sequence[float] | None = None,
    *,
    weights: Literal["float", "int8"] = "float",
    tokens: Sequence[int] | None = None,
    points: Sequence[int] | None = None,
    importance: str = "clip",
    reduction: str = DEFAULT_REDUCTION,
    alignment: str = "auto",
    calibration: Images | None = None,
    dense: Tensor | None = None,
    repair: Asked = "auto",
    seed: int = 0,
    returning: Returning = "left",
) -> Calibration | None:
    """With weights "int8" those of linear layers are put into eight bits: alone without `keep` and `tokens`, else after
    tokens are dropped and before a repair. There is no way back from it. Kinds of layers that the calibration images
    show to suffer stay in float (see `workflows.eight_bits`); without images none do. UsageError for a model that is in
    eight bits already.
    """
    drops = partial(
        pruning.compress,
        model,
        keep,
        tokens=tokens,
        points=points,
        importance=importance,
        reduction=reduction,
        alignment=alignment,
        calibration=calibration,
        dense=dense,
        seed=seed,
        returning=returning,
    )
    if weights == "float":
        return drops(repair=repair)
    if weights != "int8":
        raise UsageError(f"weights are 'float' or 'int8', not {weights!r}")
    if not isinstance(model, Backbone):
        raise UsageError(f"a {type(model).__name__} has no blocks that are known: `compress` takes a backbone")
    refuse_eight_bits(model)
    seen = None if keep is None and tokens is None else drops(repair="none")
    in_float, batches, few = prepare(model), None, None
    if calibration is not None:
        batches = as_batches(model, calibration)
        few, _ = few_images(model, calibration, batches, None)
    for warning in to_eight_bits(model, few).warnings:
        warnings.warn(warning, stacklevel=3)
    if seen is None or batches is None or repair == "none":
        return seen
    in_eight_bits = prepare(model)

    def runner(pruner: Pruner | None) -> Callable[[Tensor], Tensor]:
        return (in_float if pruner is None else in_eight_bits).with_pruner(pruner)

    return replace(seen, repair=pruning.repair(model, batches, kind=repair, runner=runner, dense=dense))


def restore(model: nn.Module) -> None:
    """`pruning.restore`: all tokens are kept again. Weights in eight bits stay so, with a warning: what was rounded
    cannot be given back."""
    pruning.restore(model)  # type: ignore[arg-type]  # it says what is no backbone
    if isinstance(model, Backbone) and model.eight_bit_kinds:
        warnings.warn(
            f"The weights of {', '.join(model.eight_bit_kinds)} stay in eight bits: what was rounded cannot be given "
            "back. Load the checkpoint again for them.",
            stacklevel=2,
        )


_compress.__doc__ = f"{pruning.compress.__doc__}\n    {_compress.__doc__}"  # whose arguments these are
compress = _reads_files(_compress, "calibration")
repair = _reads_files(pruning.repair, "images")
