"""What the families share: backbone and block, layers, routes, and what flows into a scan."""

from __future__ import annotations

from ssmprune_cli.models.common.backbone import (
    FAMILIES,
    SMALL_SIDE,
    Backbone,
    Family,
    Hints,
    ImageConfig,
    Places,
    Shapes,
    check_channels,
    count_numbered,
    tuples,
)
from ssmprune_cli.models.common.block import Block, set_drop_path, set_recompute
from ssmprune_cli.models.common.eight_bit import (
    EightBitLinear,
    linear_kinds,
    make_room_for_eight_bits,
    names_of_kinds,
    put_in_eight_bits,
    set_layer,
    some_outputs,
)
from ssmprune_cli.models.common.gate import GATE_REDUCTION, ChannelGate
from ssmprune_cli.models.common.geometry import MAX_SIDE, check_side, image_fields, no_stride, settle, square_side
from ssmprune_cli.models.common.inflow import Inflow, inflow
from ssmprune_cli.models.common.layers import (
    PatchEmbed,
    RMSNorm,
    RotaryEmbedding,
    channels_last_taps,
    check_size,
    decay_rates,
    patch_grid,
    resize_grid,
    rotary_tables,
)
from ssmprune_cli.models.common.routes import Visits, inverse, reorder, steps_of, visits

__all__ = [
    "FAMILIES",
    "GATE_REDUCTION",
    "MAX_SIDE",
    "SMALL_SIDE",
    "Backbone",
    "Block",
    "ChannelGate",
    "EightBitLinear",
    "Family",
    "Hints",
    "ImageConfig",
    "Inflow",
    "PatchEmbed",
    "Places",
    "RMSNorm",
    "RotaryEmbedding",
    "Shapes",
    "Visits",
    "channels_last_taps",
    "check_channels",
    "check_side",
    "check_size",
    "count_numbered",
    "decay_rates",
    "image_fields",
    "inflow",
    "inverse",
    "linear_kinds",
    "make_room_for_eight_bits",
    "names_of_kinds",
    "no_stride",
    "patch_grid",
    "put_in_eight_bits",
    "reorder",
    "resize_grid",
    "rotary_tables",
    "set_drop_path",
    "set_layer",
    "set_recompute",
    "settle",
    "some_outputs",
    "square_side",
    "steps_of",
    "tuples",
    "visits",
]
