"""Vim, VideoMamba and Mamba-Reg: one sequence of Mamba blocks, with a scan in each direction."""

from __future__ import annotations

from ssmprune_cli.models.mamba.mambar import MAMBA_REG
from ssmprune_cli.models.mamba.mixer import StepProjection, s4d_real
from ssmprune_cli.models.mamba.videomamba import VIDEOMAMBA
from ssmprune_cli.models.mamba.vim import VIM

__all__ = [
    "MAMBA_REG",
    "VIDEOMAMBA",
    "VIM",
    "StepProjection",
    "s4d_real",
]
