"""Models as files for other programs. A target is one file and one line in `export.py`."""

from __future__ import annotations

from ssmprune_cli.export.check import Check, same_answers
from ssmprune_cli.export.export import TARGETS, Exported, check_request, export, refuse
from ssmprune_cli.export.onnx import OnnxSession, library, make_ready, opened
from ssmprune_cli.export.place import placed
from ssmprune_cli.export.quantised import check_int8, quantised
from ssmprune_cli.export.target import ExportTarget, How

__all__ = [
    "TARGETS",
    "Check",
    "ExportTarget",
    "Exported",
    "How",
    "OnnxSession",
    "check_int8",
    "check_request",
    "export",
    "library",
    "make_ready",
    "opened",
    "placed",
    "quantised",
    "refuse",
    "same_answers",
]
