"""VMamba: four stages of blocks with four scans over the grid, and downsampling between them."""

from __future__ import annotations

from ssmprune_cli.models.vmamba.checkpoint import VMAMBA

__all__ = [
    "VMAMBA",
]
