"""Repair: what pruning did to the answers, mended in closed form from unlabelled images. Knows no model family."""

from __future__ import annotations

from ssmprune_cli.pruning.repair.features import FeaturePruner, Runner, model_runner
from ssmprune_cli.pruning.repair.quick import is_repairable, quick_answers
from ssmprune_cli.pruning.repair.repair import ENOUGH, KINDS, LEAST, Asked, fold_head, judged_rows, repair

__all__ = [
    "ENOUGH",
    "KINDS",
    "LEAST",
    "Asked",
    "FeaturePruner",
    "Runner",
    "fold_head",
    "is_repairable",
    "judged_rows",
    "model_runner",
    "quick_answers",
    "repair",
]
