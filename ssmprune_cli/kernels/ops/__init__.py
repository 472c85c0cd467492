"""The public ops: shapes, checks, gradients and counts. Who computes them is a backend's business."""

from __future__ import annotations

from ssmprune_cli.kernels.ops.blocks import inner_composed, mamba_blocks, mamba_inner
from ssmprune_cli.kernels.ops.conv import causal_conv1d, conv_flops, grid_conv2d, sparse_conv1d
from ssmprune_cli.kernels.ops.eight_bit_linear import eight_bit_linear
from ssmprune_cli.kernels.ops.linear import linear
from ssmprune_cli.kernels.ops.linear_int8 import linear_int8
from ssmprune_cli.kernels.ops.prune import move_tokens, order_tokens, rank_tokens, score_tokens
from ssmprune_cli.kernels.ops.routes import routed_scans
from ssmprune_cli.kernels.ops.rows import add_rms_norm, gated_sum
from ssmprune_cli.kernels.ops.scan import scan_flops, selective_scan
from ssmprune_cli.kernels.ops.ssd import ssd_flops, ssd_scan

__all__ = [
    "add_rms_norm",
    "causal_conv1d",
    "conv_flops",
    "eight_bit_linear",
    "gated_sum",
    "grid_conv2d",
    "inner_composed",
    "linear",
    "linear_int8",
    "mamba_blocks",
    "mamba_inner",
    "move_tokens",
    "order_tokens",
    "rank_tokens",
    "routed_scans",
    "scan_flops",
    "score_tokens",
    "selective_scan",
    "sparse_conv1d",
    "ssd_flops",
    "ssd_scan",
]
