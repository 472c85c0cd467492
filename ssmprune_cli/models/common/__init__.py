"""What the families share: backbone and block, layers, routes, and what flows into a scan."""

from __future__ import annotations

from ssmprune_cli.models.common.backbone import Backbone, Family, Hints, Places, Shapes
from ssmprune_cli.models.common.block import Block, set_drop_path, set_recompute
from ssmprune_cli.models.common.inflow import Inflow, inflow
from ssmprune_cli.models.common.layers import (
    PatchEmbed,
    RMSNorm,
    RotaryEmbedding,
    channels_last_taps,
    decay_rates,
    patch_grid,
    resize_grid,
    rotary_tables,
)
from ssmprune_cli.models.common.routes import Visits, reorder, steps_of, visits

__all__ = [
    "Backbone",
    "Block",
    "Family",
    "Hints",
    "Inflow",
    "PatchEmbed",
    "Places",
    "RMSNorm",
    "RotaryEmbedding",
    "Shapes",
    "Visits",
    "channels_last_taps",
    "decay_rates",
    "inflow",
    "patch_grid",
    "reorder",
    "resize_grid",
    "rotary_tables",
    "set_drop_path",
    "set_recompute",
    "steps_of",
    "visits",
]
