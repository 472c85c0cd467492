"""Kernels: the aligned scan, convolutions and passes over rows, and the backends that compute them, best first."""

from __future__ import annotations

from ssmprune_cli.kernels.backend import CHUNKED, REFERENCE, Backend
from ssmprune_cli.kernels.choice import (
    BACKENDS,
    active_backend,
    available_backends,
    backend_from_environment,
    backends_for,
    pick,
    refused_backends,
    use_backend,
)
from ssmprune_cli.kernels.cpu import CPU, cache_folders, cpu_facts
from ssmprune_cli.kernels.inputs import ScanInputs
from ssmprune_cli.kernels.mamba_cuda import MAMBA_CUDA
from ssmprune_cli.kernels.ops import (
    add_rms_norm,
    causal_conv1d,
    conv_flops,
    eight_bit_linear,
    gated_sum,
    grid_conv2d,
    inner_composed,
    linear,
    linear_int8,
    mamba_blocks,
    mamba_inner,
    move_tokens,
    order_tokens,
    rank_tokens,
    routed_scans,
    scan_flops,
    score_tokens,
    selective_scan,
    sparse_conv1d,
    ssd_flops,
    ssd_scan,
)
from ssmprune_cli.kernels.packing import (
    BlockSizes,
    EightBit,
    InnerParameters,
    Weight,
    pack_block,
    pack_inner,
    pack_linear,
    pack_routes,
)
from ssmprune_cli.kernels.plain import PLAIN, PLAIN_PRUNE
from ssmprune_cli.kernels.products import pack_products
from ssmprune_cli.kernels.pytorch import MOST, in_eight_bits
from ssmprune_cli.kernels.triton import TRITON

BACKENDS.register("triton", TRITON)
BACKENDS.register("mamba_cuda", MAMBA_CUDA)
BACKENDS.register("cpu", CPU)
BACKENDS.register("chunked", CHUNKED)
BACKENDS.register("reference", REFERENCE)
backend_from_environment()

__all__ = [
    "CPU",
    "MOST",
    "PLAIN",
    "PLAIN_PRUNE",
    "Backend",
    "BlockSizes",
    "EightBit",
    "InnerParameters",
    "ScanInputs",
    "Weight",
    "active_backend",
    "add_rms_norm",
    "available_backends",
    "backends_for",
    "cache_folders",
    "causal_conv1d",
    "conv_flops",
    "cpu_facts",
    "eight_bit_linear",
    "gated_sum",
    "grid_conv2d",
    "in_eight_bits",
    "inner_composed",
    "linear",
    "linear_int8",
    "mamba_blocks",
    "mamba_inner",
    "move_tokens",
    "order_tokens",
    "pack_block",
    "pack_inner",
    "pack_linear",
    "pack_products",
    "pack_routes",
    "pick",
    "rank_tokens",
    "refused_backends",
    "routed_scans",
    "scan_flops",
    "score_tokens",
    "selective_scan",
    "sparse_conv1d",
    "ssd_flops",
    "ssd_scan",
    "use_backend",
]
