"""Models as files for other programs. A target is one file and one line in `export.py`."""

from __future__ import annotations

from ssmprune_cli.export.export import TARGETS, Exported, export
from ssmprune_cli.export.target import ExportTarget

__all__ = ["TARGETS", "ExportTarget", "Exported", "export"]
