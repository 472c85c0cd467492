"""Importance scores by name."""

from __future__ import annotations

from ssmprune_cli.pruning.importance.base import Importance
from ssmprune_cli.pruning.importance.class_similarity import class_similarity
from ssmprune_cli.pruning.importance.clip import clip
from ssmprune_cli.pruning.importance.delta import delta
from ssmprune_cli.pruning.importance.hidden_norm import hidden_norm
from ssmprune_cli.pruning.importance.mean import mean
from ssmprune_cli.pruning.importance.norms import l1, l2
from ssmprune_cli.pruning.importance.random import random
from ssmprune_cli.registry import Registry

IMPORTANCES: Registry[Importance] = Registry("importance score")
IMPORTANCES.register("clip", Importance(clip))
IMPORTANCES.register("l1", Importance(l1))
IMPORTANCES.register("l2", Importance(l2))
IMPORTANCES.register("mean", Importance(mean))
IMPORTANCES.register("delta", Importance(delta, needs="delta"))
IMPORTANCES.register("hidden-norm", Importance(hidden_norm, needs="tokens"))
IMPORTANCES.register("class-similarity", Importance(class_similarity, needs="tokens"))
IMPORTANCES.register("random", Importance(random, needs="tokens"))

__all__ = [
    "IMPORTANCES",
    "Importance",
]
