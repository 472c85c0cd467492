"""ONNX: a file whose nodes for our ops carry their meaning with them, and one with standard operators only."""

from __future__ import annotations

from ssmprune_cli.export.onnx.target import ONNX, ONNX_PLAIN, library

__all__ = ["ONNX", "ONNX_PLAIN", "library"]
