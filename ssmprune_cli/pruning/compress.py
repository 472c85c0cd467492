"""The one verb: `compress(model, keep=0.8, calibration=images)` and its inverse `restore(model)`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ssmprune_cli.errors import UsageError
from ssmprune_cli.pruning.alignment import ALIGNMENTS
from ssmprune_cli.pruning.calibration import Calibration, Observable, Prunable, calibrate
from ssmprune_cli.pruning.divergence import divergence
from ssmprune_cli.pruning.images import Images, as_batches
from ssmprune_cli.pruning.mass import Distance, fit_mass
from ssmprune_cli.pruning.pruner import PruneSettings, Returning, TokenPruner
from ssmprune_cli.pruning.reduction import REDUCTIONS
from ssmprune_cli.pruning.repair import Asked, Runner
from ssmprune_cli.pruning.repair import repair as repair_pruned
from ssmprune_cli.pruning.returning import fit_returning
from ssmprune_cli.pruning.schedule import PruneSchedule

DEFAULT_REDUCTION = "context"  # where there is nothing to measure by
ALIGNMENT_IMAGES = 64  # that calibrate the alignment, of more for a repair: the mean steps of many tokens settle soon


def choose_alignment(alignment: str, reduction: str, *, calibrated: bool) -> str:
    """`alignment`, or for "auto" the best that is possible: `null` for a reduction that leaves whole grids (as good as
    any on VMamba and PlainMamba, best on Vim), `mass` for another whose tokens have sizes, `none` for one that leaves
    no gaps, else `calibrated` with calibration images and `null` without. Raises UsageError for `calibrated` without
    images."""
    if alignment == "auto":
        if REDUCTIONS.get(reduction).rectangular:
            return "null"
        if not REDUCTIONS.get(reduction).aligned:
            return "none"
        if REDUCTIONS.get(reduction).sized:
            return "mass"
        return "calibrated" if calibrated else "null"
    if ALIGNMENTS.get(alignment).needs_calibration and not calibrated:
        raise UsageError(
            f"alignment {alignment!r} needs calibration images",
            hint="Give `--calib DIR` with a few images, or choose `--alignment null`.",
        )
    return alignment


def compress(
    model: Prunable,
    keep: float | Sequence[float] | None = None,
    *,
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
    """Make `model` drop tokens between blocks, in place; `restore` undoes it. The weights do not change.

    keep         ratio of patch tokens kept *at each point*: one number or one a point (see PruneSchedule.resolve)
    tokens       instead of `keep`: patch tokens that stay after each point
    points       after how many blocks, within a stage; by default a quarter, half and three quarters of the longest
    alignment    see `choose_alignment`
    calibration  images (B, 3, H, W), normalised floats or uint8: a tensor, an array, or a loader of batches, with
                 labels or without (see `as_batches`). `ssmprune_cli.compress` also takes what is on the disk: a folder,
                 an .npz, or a list of image files (see `workflows.verbs.from_files`)
    dense        logits (images, classes) of the same images, in their order, that the alignment `mass` and a repair
                 bring the model near to; by default those of `model` as it is. Give the dense model's if `model` was
                 resized
    repair       see `repair`: it takes all calibration images, best 1,024 or more, and is not tried with fewer than 64.
                 Unless it is "none", ALIGNMENT_IMAGES of them are enough for all else
    returning    with what value a dropped token comes back, where a model makes the grid whole: as it left, that of the
                 token that is `nearest`, or a `blend` of both, which takes calibration images. See `returning`

    Returns what calibration saw and what the repair did; None without calibration images. Raises UsageError for a
    module that is none of our backbones, and for settings or images that do not fit it.
    """
    _check_backbone(model)
    rectangular = REDUCTIONS.get(reduction).rectangular
    schedule = PruneSchedule.resolve(model.stages, points=points, keep=keep, tokens=tokens, rectangular=rectangular)
    chosen = choose_alignment(alignment, reduction, calibrated=calibration is not None)
    settings = PruneSettings(schedule, importance, reduction, chosen, seed, returning=returning)
    return prune(model, settings, calibration, dense=dense, repair=repair)


def prune(
    model: Prunable,
    settings: PruneSettings,
    calibration: Images | None,
    *,
    dense: Tensor | None = None,
    repair: Asked = "none",
    runner: Runner | None = None,
    distance: Distance = divergence,
) -> Calibration | None:
    """`compress` by settings that are resolved already. `runner` and `distance` are those of `fit_mass`."""
    like, fits_mass = next(model.parameters()), ALIGNMENTS.get(settings.alignment).needs_sizes
    blends = settings.returning == "blend"
    if settings.returning != "left" and not model.restores:
        raise UsageError(
            f"in this model no dropped token comes back, so there is no {settings.returning!r} to choose",
            hint="`returning` is for models with a downsampling between stages, such as VMamba, and for dense models.",
        )
    if blends and calibration is None:
        raise UsageError("returning 'blend' needs calibration images", hint="Give some, or choose 'left'.")
    batches = () if calibration is None else as_batches(model, calibration)
    aligned, known = (batches, dense) if repair == "none" else few_images(model, calibration, batches, dense)
    kept = list(aligned) if fits_mass or blends else []  # read more than once: a loader may shuffle
    seen = None if calibration is None else calibrate(model, settings, kept or aligned)
    pruner = TokenPruner(settings, model.stages, model.mixers, seen.deltas if seen and not fits_mass else None)
    pruner.to(like.device, like.dtype)
    if seen is not None and fits_mass:
        fit_mass(model, pruner, kept, known, runner, distance)
    if blends:
        fit_returning(model, pruner, kept)
    model.pruner = pruner
    if seen is None or repair == "none":
        return seen
    return replace(seen, repair=repair_pruned(model, batches, kind=repair, dense=dense))


def few_images(
    model: Prunable, images: Images | None, batches: Iterable[Tensor], dense: Tensor | None
) -> tuple[Iterable[Tensor], Tensor | None]:
    """As batches, ALIGNMENT_IMAGES of the images, and their `dense` logits. Of `batches` the first; of an array from
    all over it, for it may come class by class."""
    if isinstance(images, Tensor | np.ndarray) and len(images) > ALIGNMENT_IMAGES:
        rows = torch.arange(ALIGNMENT_IMAGES) * len(images) // ALIGNMENT_IMAGES
        return as_batches(model, torch.as_tensor(images)[rows]), None if dense is None else dense[rows]
    return _first(batches, ALIGNMENT_IMAGES), None if dense is None else dense[:ALIGNMENT_IMAGES]


def _first(batches: Iterable[Tensor], count: int) -> Iterator[Tensor]:
    """The first `count` images."""
    for batch in batches:
        yield batch[:count]
        count -= len(batch)
        if count <= 0:
            return


def restore(model: Observable) -> None:
    """Make `model` dense again. Raises UsageError for a module that is none of our backbones."""
    _check_backbone(model)
    model.pruner = None


def _check_backbone(model: object) -> None:
    if not all(hasattr(model, name) for name in ("pruner", "mixers", "stages")):
        raise UsageError(
            f"a {type(model).__name__} has no place to drop tokens at: `compress` and `restore` take a backbone",
            hint='Load the checkpoint with `ssmprune_cli.load("FILE.pth")`, and give what it returns.',
        )
