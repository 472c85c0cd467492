"""EfficientVMamba: two stages of blocks with four scans over a quarter of the grid each, then two of convolutions."""

from __future__ import annotations

from ssmprune_cli.models.efficientvmamba.checkpoint import EFFICIENTVMAMBA
from ssmprune_cli.models.efficientvmamba.mixer import AtrousMixer

__all__ = ["EFFICIENTVMAMBA", "AtrousMixer"]
