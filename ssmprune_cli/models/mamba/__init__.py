"""Vim, VideoMamba, Mamba-Reg and LocalVim: one sequence of Mamba blocks, with several scans each."""

from __future__ import annotations

from ssmprune_cli.models.mamba.backbone import MambaBackbone, MambaSequence
from ssmprune_cli.models.mamba.block import MambaBlock, unit_tokens
from ssmprune_cli.models.mamba.causal_sources import centred_sources, conv_sources
from ssmprune_cli.models.mamba.local_mixer import LocalMixer
from ssmprune_cli.models.mamba.local_routes import scan_path
from ssmprune_cli.models.mamba.localvim import LOCALVIM
from ssmprune_cli.models.mamba.mambar import MAMBA_REG
from ssmprune_cli.models.mamba.mixer import (
    BranchMixer,
    CausalConv1d,
    MambaMixer,
    SequenceMixer,
    StepProjection,
    s4d_real,
)
from ssmprune_cli.models.mamba.videomamba import VIDEOMAMBA
from ssmprune_cli.models.mamba.vim import VIM

__all__ = [
    "LOCALVIM",
    "MAMBA_REG",
    "VIDEOMAMBA",
    "VIM",
    "BranchMixer",
    "CausalConv1d",
    "LocalMixer",
    "MambaBackbone",
    "MambaBlock",
    "MambaMixer",
    "MambaSequence",
    "SequenceMixer",
    "StepProjection",
    "centred_sources",
    "conv_sources",
    "s4d_real",
    "scan_path",
    "unit_tokens",
]
