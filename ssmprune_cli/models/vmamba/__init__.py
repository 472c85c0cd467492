"""VMamba: four stages of blocks with four scans over the grid, and downsampling between them."""

from __future__ import annotations

from ssmprune_cli.models.vmamba.checkpoint import (
    VMAMBA,
    fills,
    image_side,
    read_config,
    remap,
    resize,
    stage_depths,
    todays_names,
)
from ssmprune_cli.models.vmamba.layers import MLP, DownsampleV1, PatchEmbedV1
from ssmprune_cli.models.vmamba.mixer import DIRECTIONS, DirectionProjections, VMambaMixer, column_gaps
from ssmprune_cli.models.vmamba.model import VMamba, VMambaConfig
from ssmprune_cli.models.vmamba.staged import StagedBackbone, next_stage

__all__ = [
    "DIRECTIONS",
    "MLP",
    "VMAMBA",
    "DirectionProjections",
    "DownsampleV1",
    "PatchEmbedV1",
    "StagedBackbone",
    "VMamba",
    "VMambaConfig",
    "VMambaMixer",
    "column_gaps",
    "fills",
    "image_side",
    "next_stage",
    "read_config",
    "remap",
    "resize",
    "stage_depths",
    "todays_names",
]
