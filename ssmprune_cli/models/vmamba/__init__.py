"""VMamba: four stages of blocks with four scans over the grid, and downsampling between them."""

from __future__ import annotations

from ssmprune_cli.models.vmamba.checkpoint import VMAMBA, image_side, remap, stage_depths, todays_names
from ssmprune_cli.models.vmamba.layers import MLP, DownsampleV1, PatchEmbedV1
from ssmprune_cli.models.vmamba.mixer import DirectionProjections, VMambaMixer, column_gaps
from ssmprune_cli.models.vmamba.model import VMamba, VMambaConfig
from ssmprune_cli.models.vmamba.staged import StagedBackbone, next_stage

__all__ = [
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
    "image_side",
    "next_stage",
    "remap",
    "stage_depths",
    "todays_names",
]
