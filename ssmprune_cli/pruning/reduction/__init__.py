"""Reductions by name."""

from __future__ import annotations

from ssmprune_cli.pruning.reduction.base import Reduction, rank
from ssmprune_cli.pruning.reduction.context import CONTEXT
from ssmprune_cli.pruning.reduction.drop import DROP
from ssmprune_cli.pruning.reduction.drop_unsorted import DROP_UNSORTED
from ssmprune_cli.pruning.reduction.frozen import FROZEN, FROZEN_NEAR, FROZEN_ONCE, FROZEN_PAIRS
from ssmprune_cli.pruning.reduction.fuse import FUSE
from ssmprune_cli.pruning.reduction.grid_merge import GRID_MERGE
from ssmprune_cli.pruning.reduction.keep_target_source import KEEP_TARGET_SOURCE
from ssmprune_cli.pruning.reduction.local_merge import LOCAL_MERGE
from ssmprune_cli.pruning.reduction.mask import MASK
from ssmprune_cli.pruning.reduction.merge import HYBRID, MERGE
from ssmprune_cli.pruning.reduction.pool import POOL
from ssmprune_cli.registry import Registry

REDUCTIONS: Registry[Reduction] = Registry("reduction")
REDUCTIONS.register("drop", DROP)
REDUCTIONS.register("context", CONTEXT)
REDUCTIONS.register("frozen", FROZEN)
REDUCTIONS.register("frozen-once", FROZEN_ONCE)
REDUCTIONS.register("frozen-near", FROZEN_NEAR)
REDUCTIONS.register("frozen-pairs", FROZEN_PAIRS)
REDUCTIONS.register("local-merge", LOCAL_MERGE)
REDUCTIONS.register("pool", POOL)
REDUCTIONS.register("merge", MERGE)
REDUCTIONS.register("hybrid", HYBRID)
REDUCTIONS.register("keep-target-source", KEEP_TARGET_SOURCE)
REDUCTIONS.register("fuse", FUSE)
REDUCTIONS.register("grid-merge", GRID_MERGE)
REDUCTIONS.register("drop-unsorted", DROP_UNSORTED)
REDUCTIONS.register("mask", MASK)

__all__ = [
    "REDUCTIONS",
    "Reduction",
    "rank",
]
