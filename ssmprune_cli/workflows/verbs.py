"""`compress` and `repair` as Python calls them: images may also be a folder, or files; models may be anybody's."""

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
from typing import Any, Literal, ParamSpec, TypeVar, overload

from torch import Tensor, nn

from ssmprune_cli import adapt, pruning
from ssmprune_cli.adapt import Compressed
from ssmprune_cli.data import ImageDataset, Subset
from ssmprune_cli.errors import UsageError
from ssmprune_cli.inference import prepare
from ssmprune_cli.interface import Pruner
from ssmprune_cli.models import Backbone
from ssmprune_cli.pruning import Asked, Calibration, Images, Returning, as_batches, few_images
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


@overload
def compress(  # type: ignore[overload-overlap]
    model: Backbone,
    keep: float | Sequence[float] | None = None,
    *,
    weights: Literal["float", "int8"] = "float",
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
    """Make `model` drop tokens, in place; `restore` undoes it. The weights do not change unless they are
    put into eight bits.

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

    Options for a backbone of ours: `dense`, `repair`, `returning`, and

    weights      "int8" puts those of linear layers into eight bits: alone without `keep` and `tokens`, else after
                 tokens are dropped and before a repair. There is no way back from it. Kinds of layers that the
                 calibration images show to suffer stay in float (see `workflows.eight_bits`); without images none do

    Returns what calibration saw. Raises UsageError for settings, inputs and modules that do not fit, and for a model
    that is to be put into eight bits and is already.
    """
    ours = isinstance(model, Backbone)
    refused = {"protect", "tokenwise"} if ours else {"dense", "repair", "returning", "weights"}
    for name in sorted(refused & set(options)):
        raise UsageError(
            f"`{name}` is for {'modules of your own' if ours else 'backbones of ours'}, and the model is a "
            f"{type(model).__name__}"
        )
    if isinstance(model, Backbone):
        return _compress_backbone(model, keep, **options)
    options.setdefault("calibration", None)
    return adapt.compress(model, keep, **options)


def _compress(
    model: Backbone,
    keep: float | Sequence[float] | None = None,
    *,
    weights: Literal["float", "int8"] = "float",
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
) -> Calibration | None:
    """`pruning.compress`, and weights in eight bits: see `compress`."""
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
    refuse_eight_bits(model)
    seen = None if keep is None and tokens is None else drops(repair="none")
    in_float, batches, few = prepare(model), None, None
    if calibration is not None:
        batches = as_batches(model, calibration)
        few, _ = few_images(model, calibration, batches, None)
    for warning in to_eight_bits(model, few).warnings:
        warnings.warn(warning, stacklevel=4)
    if seen is None or batches is None or repair == "none":
        return seen
    in_eight_bits = prepare(model)

    def runner(pruner: Pruner | None) -> Callable[[Tensor], Tensor]:
        return (in_float if pruner is None else in_eight_bits).with_pruner(pruner)

    return replace(seen, repair=pruning.repair(model, batches, kind=repair, runner=runner, dense=dense))


def restore(model: nn.Module) -> None:
    """Undo `compress` and `accelerate`: a backbone keeps all tokens again, a module of your own runs its own code.

    Weights in eight bits stay so, with a warning: what was rounded cannot be given back. Raises UsageError for a module
    that is neither compressed nor accelerated.
    """
    adapt.restore(model)
    if isinstance(model, Backbone) and model.eight_bit_kinds:
        warnings.warn(
            f"The weights of {', '.join(model.eight_bit_kinds)} stay in eight bits: what was rounded cannot be given "
            "back. Load the checkpoint again for them.",
            stacklevel=2,
        )


_compress_backbone = _reads_files(_compress, "calibration")
repair = _reads_files(pruning.repair, "images")
