"""Token pruning: schedule, importance, reduction, alignment and calibration. Knows no model family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmprune_cli.errors import CheckpointError, UsageError
from ssmprune_cli.pruning.alignment import ALIGNMENTS
from ssmprune_cli.pruning.calibration import Calibration, Prunable, calibrate
from ssmprune_cli.pruning.compress import DEFAULT_REDUCTION, choose_alignment, compress, restore
from ssmprune_cli.pruning.divergence import clearly_less, divergence, paired, soft_divergence
from ssmprune_cli.pruning.importance import IMPORTANCES
from ssmprune_cli.pruning.mass import fit_mass
from ssmprune_cli.pruning.method import Method, known_methods
from ssmprune_cli.pruning.pruner import PruneSettings, TokenPruner
from ssmprune_cli.pruning.reduction import REDUCTIONS
from ssmprune_cli.pruning.schedule import PruneSchedule, default_points


def attach(model: Prunable, settings: Mapping[str, Any]) -> None:
    """Put an uncalibrated TokenPruner into `model`, from the settings of a config.json: its buffers are loaded next.

    Raises CheckpointError for settings that no compression of this model gives.
    """
    read = PruneSettings.from_dict(settings)
    try:
        PruneSchedule.resolve(model.stages, points=read.schedule.points, tokens=read.schedule.tokens)
    except UsageError as error:
        what = f"the pruning settings are not valid: {error.where}: {error.what}"
        raise CheckpointError(what, where="config.json") from error
    model.pruner = TokenPruner(read, model.stages, model.mixers)


__all__ = [
    "ALIGNMENTS",
    "DEFAULT_REDUCTION",
    "IMPORTANCES",
    "REDUCTIONS",
    "Calibration",
    "Method",
    "PruneSchedule",
    "PruneSettings",
    "TokenPruner",
    "attach",
    "calibrate",
    "choose_alignment",
    "clearly_less",
    "compress",
    "default_points",
    "divergence",
    "fit_mass",
    "known_methods",
    "paired",
    "restore",
    "soft_divergence",
]
