"""VMamba: four stages of blocks with four scans over the grid, and downsampling between them."""

from __future__ import annotations

from ssmprune_cli.models.vmamba.checkpoint import VMAMBA
from ssmprune_cli.models.vmamba.mixer import DirectionProjections, VMambaMixer, column_gaps

__all__ = [
    "VMAMBA",
    "DirectionProjections",
    "VMambaMixer",
    "column_gaps",
]
