"""Kernels: the aligned scan, convolutions and passes over rows, and the backends that compute them, best first."""

from __future__ import annotations

from ssmprune_cli.kernels.backend import CHUNKED, REFERENCE
from ssmprune_cli.kernels.choice import (
    BACKENDS,
    active_backend,
    available_backends,
    backend_from_environment,
    backends_for,
    refused_backends,
    use_backend,
)
from ssmprune_cli.kernels.cpu import CPU
from ssmprune_cli.kernels.mamba_cuda import MAMBA_CUDA
from ssmprune_cli.kernels.ops import (
    add_rms_norm,
    block_parts,
    causal_conv1d,
    conv_flops,
    fused_ops_apart,
    fuses_inner,
    gated_sum,
    grid_conv2d,
    linear,
    mamba_blocks,
    mamba_inner,
    routed_scans,
    scan_flops,
    selective_scan,
    sparse_conv1d,
    suits_linear,
    tracing,
)
from ssmprune_cli.kernels.packing import BlockSizes, InnerParameters, pack_block, pack_inner, pack_linear, pack_routes
from ssmprune_cli.kernels.triton import TRITON

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
    "tracing",
    "use_backend",
]
