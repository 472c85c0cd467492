"""The one verb: `compress(model, keep=0.8, calibration=images)` and its inverse `restore(model)`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ssmprune_cli.errors import UsageError
from ssmprune_cli.pruning.alignment import ALIGNMENTS
from ssmprune_cli.pruning.calibration import Calibration, Prunable, calibrate
from ssmprune_cli.pruning.images import Images, as_batches
from ssmprune_cli.pruning.mass import fit_mass
from ssmprune_cli.pruning.pruner import PruneSettings, TokenPruner
from ssmprune_cli.pruning.reduction import REDUCTIONS
from ssmprune_cli.pruning.schedule import PruneSchedule

DEFAULT_REDUCTION = "context"  # where there is nothing to measure by


def choose_alignment(alignment: str, reduction: str, *, calibrated: bool) -> str:
    """`alignment`, or for "auto" the best that is possible: `mass` for a reduction whose tokens have sizes, `none` for
    one that leaves no gaps, else `calibrated` with calibration images and `null` without. Raises UsageError for
    `calibrated` without images."""
    if alignment == "auto":
        if REDUCTIONS.get(reduction).sized:
            return "mass"
        if not REDUCTIONS.get(reduction).aligned:
            return "none"
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
    seed: int = 0,
) -> Calibration | None:
    """Make `model` drop tokens between blocks, in place; `restore` undoes it. The weights do not change.

    keep         ratio of patch tokens kept *at each point*: one number or one a point (see PruneSchedule.resolve)
    tokens       instead of `keep`: patch tokens that stay after each point
    points       after how many blocks, within a stage; by default a quarter, half and three quarters of the longest
    alignment    see `choose_alignment`
    calibration  images (B, 3, H, W), normalised floats or uint8: a tensor, an array, or a loader of batches, with
                 labels or without (see `as_batches`)
    dense        logits (images, classes) of the same images that the alignment `mass` brings the model near to; by
                 default those of `model` as it is. Give the dense model's if `model` was resized

    Returns what calibration saw, or None without it. Raises UsageError for a module that is none of our backbones, and
    for settings or images that do not fit it.
    """
    _check_backbone(model)
    schedule = PruneSchedule.resolve(model.stages, points=points, keep=keep, tokens=tokens)
    chosen = choose_alignment(alignment, reduction, calibrated=calibration is not None)
    settings = PruneSettings(schedule, importance, reduction, chosen, seed)
    like, fits_mass = next(model.parameters()), ALIGNMENTS.get(chosen).needs_sizes
    batches = () if calibration is None else as_batches(model, calibration)
    kept = list(batches) if fits_mass else []  # read once more for every mass: a loader may shuffle
    seen = None if calibration is None else calibrate(model, settings, kept or batches)
    pruner = TokenPruner(settings, model.stages, model.mixers, seen.deltas if seen and not fits_mass else None)
    pruner.to(like.device, like.dtype)
    if seen is not None and fits_mass:
        fit_mass(model, pruner, kept, dense)
    model.pruner = pruner
    return seen


def restore(model: Prunable) -> None:
    """Make `model` dense again. Raises UsageError for a module that is none of our backbones."""
    _check_backbone(model)
    model.pruner = None


def _check_backbone(model: object) -> None:
    if not all(hasattr(model, name) for name in ("pruner", "mixers", "stages")):
        raise UsageError(
            f"a {type(model).__name__} has no place to drop tokens at: `compress` and `restore` take a backbone",
            hint='Load the checkpoint with `ssmprune_cli.load("FILE.pth")`, and give what it returns.',
        )
