"""Language models: Mamba-1 and Mamba-2, prefill with tokens dropped, and generation."""

from __future__ import annotations

from ssmprune_cli.models.language.backbone import LanguageModel
from ssmprune_cli.models.language.config import MAX_LENGTH
from ssmprune_cli.models.language.generation import Prefilled, generate, prefill, step
from ssmprune_cli.models.language.mamba1 import MAMBA1
from ssmprune_cli.models.language.mamba2 import MAMBA2, Mamba2Mixer

__all__ = [
    "MAMBA1",
    "MAMBA2",
    "MAX_LENGTH",
    "LanguageModel",
    "Mamba2Mixer",
    "Prefilled",
    "generate",
    "prefill",
    "step",
]
