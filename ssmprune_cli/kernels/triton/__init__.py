"""Backend `triton`: kernels for NVIDIA GPUs."""

from __future__ import annotations

from ssmprune_cli.kernels.triton.backend import TRITON

__all__ = [
    "TRITON",
]
