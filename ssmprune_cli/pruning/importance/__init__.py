"""Importance scores by name."""

from __future__ import annotations

from ssmprune_cli.pruning.importance.base import Importance
from ssmprune_cli.pruning.importance.clip import clip
from ssmprune_cli.pruning.importance.mean import mean
from ssmprune_cli.pruning.importance.norms import l1, l2
from ssmprune_cli.pruning.importance.random import random
from ssmprune_cli.registry import Registry

IMPORTANCES: Registry[Importance] = Registry("importance score")
IMPORTANCES.register("clip", clip)
IMPORTANCES.register("l1", l1)
IMPORTANCES.register("l2", l2)
IMPORTANCES.register("mean", mean)
IMPORTANCES.register("random", random)

__all__ = ["IMPORTANCES", "Importance"]
