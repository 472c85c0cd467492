"""The public ops: shapes, checks, gradients and counts. Who computes them is a backend's business."""

from __future__ import annotations

from ssmprune_cli.kernels.ops.blocks import block_parts, fused_ops_apart, fuses_inner, mamba_blocks, mamba_inner
from ssmprune_cli.kernels.ops.conv import causal_conv1d, conv_flops, grid_conv2d, sparse_conv1d
from ssmprune_cli.kernels.ops.library import tracing
from ssmprune_cli.kernels.ops.linear import linear, suits_linear
from ssmprune_cli.kernels.ops.routes import routed_scans
from ssmprune_cli.kernels.ops.rows import add_rms_norm, gated_sum
from ssmprune_cli.kernels.ops.scan import scan_flops, selective_scan

__all__ = [
    "add_rms_norm",
    "block_parts",
    "causal_conv1d",
    "conv_flops",
    "fused_ops_apart",
    "fuses_inner",
    "gated_sum",
    "grid_conv2d",
    "linear",
    "mamba_blocks",
    "mamba_inner",
    "routed_scans",
    "scan_flops",
    "selective_scan",
    "sparse_conv1d",
    "suits_linear",
    "tracing",
]
