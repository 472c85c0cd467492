"""What the families share: backbone and block, layers, routes, and what flows into a scan."""

from __future__ import annotations

from ssmprune_cli.models.common.backbone import Backbone, Family, Hints, Shapes
from ssmprune_cli.models.common.block import Block, blocks, set_drop_path, set_recompute
from ssmprune_cli.models.common.inflow import Inflow, can_align, inflow
from ssmprune_cli.models.common.layers import (
    Derived,
    Kept,
    PatchEmbed,
    RMSNorm,
    RotaryEmbedding,
    channels_last_taps,
    decay_rates,
    is_plain,
    kept_tensors,
    packed_linear,
    patch_grid,
    project,
    resize_grid,
    rotary_tables,
)
from ssmprune_cli.models.common.routes import Visits, reorder, steps_of, visits

__all__ = [
    "Backbone",
    "Block",
    "Derived",
    "Family",
    "Hints",
    "Inflow",
    "Kept",
    "PatchEmbed",
    "RMSNorm",
    "RotaryEmbedding",
    "Shapes",
    "Visits",
    "blocks",
    "can_align",
    "channels_last_taps",
    "decay_rates",
    "inflow",
    "is_plain",
    "kept_tensors",
    "packed_linear",
    "patch_grid",
    "project",
    "reorder",
    "resize_grid",
    "rotary_tables",
    "set_drop_path",
    "set_recompute",
    "steps_of",
    "visits",
]
