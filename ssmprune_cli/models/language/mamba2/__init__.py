"""Mamba-2 language models."""

from __future__ import annotations

from ssmprune_cli.models.language.mamba2.mixer import Mamba2Mixer
from ssmprune_cli.models.language.mamba2.model import MAMBA2, Mamba2LM

__all__ = ["MAMBA2", "Mamba2LM", "Mamba2Mixer"]
