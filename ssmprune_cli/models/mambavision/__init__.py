"""MambaVision: two levels of convolutions, then two of blocks with a scan and blocks with attention."""

from __future__ import annotations

from ssmprune_cli.models.mambavision.checkpoint import MAMBAVISION
from ssmprune_cli.models.mambavision.mixers import AttentionMixer, CentredMixer

__all__ = ["MAMBAVISION", "AttentionMixer", "CentredMixer"]
