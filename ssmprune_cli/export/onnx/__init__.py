"""ONNX: a file whose nodes for our ops carry their meaning with them, and one with standard operators only."""

from __future__ import annotations

from ssmprune_cli.export.onnx.session import OnnxSession, library, make_ready, opened
from ssmprune_cli.export.onnx.target import ONNX, ONNX_PLAIN

__all__ = ["ONNX", "ONNX_PLAIN", "OnnxSession", "library", "make_ready", "opened"]
