"""Token pruning: schedule, importance, reduction, alignment and calibration. Knows no model family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ssmprune_cli.errors import CheckpointError, UsageError
from ssmprune_cli.pruning.alignment import ALIGNMENTS
from ssmprune_cli.pruning.calibration import Calibration, Observable, Prunable, calibrate
from ssmprune_cli.pruning.compress import (
    ALIGNMENT_IMAGES,
    DEFAULT_REDUCTION,
    choose_alignment,
    compress,
    few_images,
    prune,
    restore,
)
from ssmprune_cli.pruning.correction import Correction, Held, Repaired
from ssmprune_cli.pruning.divergence import clearly_less, divergence, paired, relative_error, soft_divergence
from ssmprune_cli.pruning.images import Images, as_batches
from ssmprune_cli.pruning.importance import IMPORTANCES
from ssmprune_cli.pruning.mass import fit_mass
from ssmprune_cli.pruning.method import Method, known_methods
from ssmprune_cli.pruning.pruner import PruneSettings, Returning, TokenPruner
from ssmprune_cli.pruning.reduction import REDUCTIONS
from ssmprune_cli.pruning.repair import (
    ENOUGH,
    KINDS,
    LEAST,
    Asked,
    FeaturePruner,
    Runner,
    fold_head,
    is_repairable,
    judged_rows,
    quick_answers,
    repair,
)
from ssmprune_cli.pruning.schedule import PruneSchedule, default_points
from ssmprune_cli.pruning.sizes import at_size


def attach(model: Prunable, settings: Mapping[str, Any]) -> None:
    """Put an uncalibrated TokenPruner into `model`, from the settings of a config.json: its buffers are loaded next.

    Raises CheckpointError for settings that no compression of this model gives.
    """
    read = PruneSettings.from_dict(settings)
    schedule, rectangular = read.schedule, REDUCTIONS.get(read.reduction).rectangular
    try:
        possible = PruneSchedule.resolve(
            model.stages, points=schedule.points, tokens=schedule.tokens, rectangular=rectangular
        )
    except UsageError as error:
        what = f"the pruning settings are not valid: {error.where}: {error.what}"
        raise CheckpointError(what, where="config.json") from error
    if schedule != possible:
        what = f"the pruning settings are not valid: grids {schedule.grids} are not those of {schedule.tokens} tokens"
        raise CheckpointError(what, where="config.json")
    if read.returning != "left" and not model.restores:
        what = (
            f"the pruning settings are not valid: no token comes back in this model, by {read.returning!r} or otherwise"
        )
        raise CheckpointError(what, where="config.json")
    pruner = TokenPruner(read, model.stages, model.mixers, unfilled=True)
    if read.repair != "none":
        pruner.correct(_empty(read.repair, pruner, model))
    model.pruner = pruner


def _empty(held: Held, pruner: TokenPruner, model: Prunable) -> Correction:
    """A correction of the shapes that a repair of `model` has."""
    layer = model.output_layer
    head = (torch.empty(layer.weight.shape), torch.empty(layer.out_features))
    widths = {point: model.mixers[point - 1].d_model for point in pruner.dropping_points}
    side = {point: torch.empty(layer.in_features, width) for point, width in widths.items()}
    return Correction(head if held.startswith("head") else None, side if held.endswith("side") else {})


__all__ = [
    "ALIGNMENTS",
    "ALIGNMENT_IMAGES",
    "DEFAULT_REDUCTION",
    "ENOUGH",
    "IMPORTANCES",
    "KINDS",
    "LEAST",
    "REDUCTIONS",
    "Asked",
    "Calibration",
    "Correction",
    "FeaturePruner",
    "Images",
    "Method",
    "Observable",
    "PruneSchedule",
    "PruneSettings",
    "Repaired",
    "Returning",
    "Runner",
    "TokenPruner",
    "as_batches",
    "at_size",
    "attach",
    "calibrate",
    "choose_alignment",
    "clearly_less",
    "compress",
    "default_points",
    "divergence",
    "few_images",
    "fit_mass",
    "fold_head",
    "is_repairable",
    "judged_rows",
    "known_methods",
    "paired",
    "prune",
    "quick_answers",
    "relative_error",
    "repair",
    "restore",
    "soft_divergence",
]
