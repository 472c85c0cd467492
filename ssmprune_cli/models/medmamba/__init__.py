"""MedMamba: blocks of two halves, convolutions and four scans, in four stages."""

from __future__ import annotations

from ssmprune_cli.models.medmamba.checkpoint import MEDMAMBA

__all__ = ["MEDMAMBA"]
