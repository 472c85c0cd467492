"""Every op in plain PyTorch: the truth that the backends are tested against, and what they fall back on."""

from __future__ import annotations

from ssmprune_cli.kernels.pytorch import composed, eager, prune
from ssmprune_cli.kernels.pytorch.eight_bit import MOST, eight_bit_linear, in_eight_bits
from ssmprune_cli.kernels.pytorch.scan import chunked_scan, finish, reference_scan, scan_gradients, steps
from ssmprune_cli.kernels.pytorch.ssd import SSD_CHUNK, chunked_ssd, reference_ssd, ssd_gradients, ssd_steps

__all__ = [
    "MOST",
    "SSD_CHUNK",
    "chunked_scan",
    "chunked_ssd",
    "composed",
    "eager",
    "eight_bit_linear",
    "finish",
    "in_eight_bits",
    "prune",
    "reference_scan",
    "reference_ssd",
    "scan_gradients",
    "ssd_gradients",
    "ssd_steps",
    "steps",
]
