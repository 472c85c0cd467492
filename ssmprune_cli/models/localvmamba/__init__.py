"""LocalVMamba: a VMamba whose blocks scan rows, columns and windows of the grid, each in directions of its own."""

from __future__ import annotations

from ssmprune_cli.models.localvmamba.checkpoint import LOCALVMAMBA
from ssmprune_cli.models.localvmamba.mixer import LocalVMambaMixer, RouteProjections

__all__ = ["LOCALVMAMBA", "LocalVMambaMixer", "RouteProjections"]
