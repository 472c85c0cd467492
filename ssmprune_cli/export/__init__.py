"""Models as files for other programs. A target is one file and one line in `export.py`."""

from __future__ import annotations

from ssmprune_cli.export.export import TARGETS, Check, Exported, check_request, export, refuse
from ssmprune_cli.export.onnx import OnnxSession, library, make_ready, opened
from ssmprune_cli.export.target import ExportTarget

__all__ = [
    "TARGETS",
    "Check",
    "ExportTarget",
    "Exported",
    "OnnxSession",
    "check_request",
    "export",
    "library",
    "make_ready",
    "opened",
    "refuse",
]
