"""VMamba: four stages of blocks with four scans over the grid, and downsampling between them."""

from __future__ import annotations

from ssmprune_cli.models.vmamba.checkpoint import VMAMBA
from ssmprune_cli.models.vmamba.mixer import DirectionProjections, VMambaMixer, column_gaps
from ssmprune_cli.models.vmamba.model import VMamba, VMambaConfig

__all__ = [
    "VMAMBA",
    "DirectionProjections",
    "VMamba",
    "VMambaConfig",
    "VMambaMixer",
    "column_gaps",
]
