"""PlainMamba: blocks of one width whose scans follow four snakes over the grid."""

from __future__ import annotations

from ssmprune_cli.models.plainmamba.checkpoint import PLAINMAMBA

__all__ = [
    "PLAINMAMBA",
]
