"""Every op in plain PyTorch: the truth that the backends are tested against, and what they fall back on."""

from __future__ import annotations

from ssmprune_cli.kernels.pytorch import composed, eager
from ssmprune_cli.kernels.pytorch.scan import chunked_scan, finish, reference_scan, scan_gradients, steps

__all__ = [
    "chunked_scan",
    "composed",
    "eager",
    "finish",
    "reference_scan",
    "scan_gradients",
    "steps",
]
