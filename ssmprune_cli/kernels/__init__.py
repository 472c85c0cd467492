"""Kernels: the aligned scan, convolutions and passes over rows, and the backends that compute them, best first."""

from __future__ import annotations

from ssmprune_cli.kernels.backend import (
    BACKENDS,
    active_backend,
    available_backends,
    backend_from_environment,
    backends_for,
    refused_backends,
    use_backend,
)
from ssmprune_cli.kernels.conv_op import causal_conv1d, conv_flops, grid_conv2d, sparse_conv1d
from ssmprune_cli.kernels.cpu import CPU
from ssmprune_cli.kernels.fused_op import block_parts, fused_ops_apart, fuses_inner, mamba_blocks, mamba_inner
from ssmprune_cli.kernels.linear_op import linear, suits_linear
from ssmprune_cli.kernels.mamba_cuda import MAMBA_CUDA
from ssmprune_cli.kernels.op import scan_flops, selective_scan
from ssmprune_cli.kernels.packing import BlockSizes, InnerParameters, pack_block, pack_inner, pack_linear, pack_routes
from ssmprune_cli.kernels.pytorch import CHUNKED, REFERENCE
from ssmprune_cli.kernels.routes_op import routed_scans
from ssmprune_cli.kernels.row_ops import add_rms_norm, gated_sum
from ssmprune_cli.kernels.triton_backend import TRITON

BACKENDS.register("triton", TRITON)
BACKENDS.register("mamba_cuda", MAMBA_CUDA)
BACKENDS.register("cpu", CPU)
BACKENDS.register("chunked", CHUNKED)
BACKENDS.register("reference", REFERENCE)
backend_from_environment()

__all__ = [
    "BlockSizes",
    "InnerParameters",
    "active_backend",
    "add_rms_norm",
    "available_backends",
    "backends_for",
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
    "pack_block",
    "pack_inner",
    "pack_linear",
    "pack_routes",
    "refused_backends",
    "routed_scans",
    "scan_flops",
    "selective_scan",
    "sparse_conv1d",
    "suits_linear",
    "use_backend",
]
