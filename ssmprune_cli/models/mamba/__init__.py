"""Vim, VideoMamba, Mamba-Reg and LocalVim: one sequence of Mamba blocks, with several scans each."""

from __future__ import annotations

from ssmprune_cli.models.mamba.backbone import MambaBackbone, MambaConfig, MambaSequence
from ssmprune_cli.models.mamba.block import MambaBlock, unit_tokens
from ssmprune_cli.models.mamba.causal_sources import centred_sources, conv_sources
from ssmprune_cli.models.mamba.directions import Directions, checked_directions, searched, settled_directions
from ssmprune_cli.models.mamba.local_mixer import LocalMixer
from ssmprune_cli.models.mamba.local_routes import DIRECTION, ScanPath, scan_path
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
from ssmprune_cli.models.mamba.videomamba_clips import VIDEOMAMBA_CLIPS
from ssmprune_cli.models.mamba.vim import VIM

__all__ = [
    "DIRECTION",
    "LOCALVIM",
    "MAMBA_REG",
    "VIDEOMAMBA",
    "VIDEOMAMBA_CLIPS",
    "VIM",
    "BranchMixer",
    "CausalConv1d",
    "Directions",
    "LocalMixer",
    "MambaBackbone",
    "MambaBlock",
    "MambaConfig",
    "MambaMixer",
    "MambaSequence",
    "ScanPath",
    "SequenceMixer",
    "StepProjection",
    "centred_sources",
    "checked_directions",
    "conv_sources",
    "s4d_real",
    "scan_path",
    "searched",
    "settled_directions",
    "unit_tokens",
]
