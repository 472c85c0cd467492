"""Mamba language models (the first Mamba)."""

from __future__ import annotations

from ssmprune_cli.models.language.mamba1.model import MAMBA1, Mamba1LM

__all__ = ["MAMBA1", "Mamba1LM"]
