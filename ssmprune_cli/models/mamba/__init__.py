"""Vim, VideoMamba and Mamba-Reg: one sequence of Mamba blocks, with a scan in each direction."""

from __future__ import annotations

from ssmprune_cli.models.mamba.backbone import MambaBackbone
from ssmprune_cli.models.mamba.block import MambaBlock, unit_tokens
from ssmprune_cli.models.mamba.causal_sources import conv_sources
from ssmprune_cli.models.mamba.mambar import MAMBA_REG
from ssmprune_cli.models.mamba.mixer import CausalConv1d, MambaMixer, StepProjection, s4d_real
from ssmprune_cli.models.mamba.videomamba import VIDEOMAMBA
from ssmprune_cli.models.mamba.vim import VIM

__all__ = [
    "MAMBA_REG",
    "VIDEOMAMBA",
    "VIM",
    "CausalConv1d",
    "MambaBackbone",
    "MambaBlock",
    "MambaMixer",
    "StepProjection",
    "conv_sources",
    "s4d_real",
    "unit_tokens",
]
