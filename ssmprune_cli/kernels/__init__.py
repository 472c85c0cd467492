"""Kernels: one aligned scan and one convolution, and the backends that compute them, best first."""

from __future__ import annotations

from ssmprune_cli.kernels.backend import (
    BACKENDS,
    active_backend,
    available_backends,
    backend_from_environment,
    use_backend,
)
from ssmprune_cli.kernels.cpu import CPU
from ssmprune_cli.kernels.grid_conv import grid_conv2d
from ssmprune_cli.kernels.mamba_cuda import MAMBA_CUDA
from ssmprune_cli.kernels.op import causal_conv1d, conv_flops, scan_flops, selective_scan
from ssmprune_cli.kernels.pytorch import CHUNKED, REFERENCE
from ssmprune_cli.kernels.triton_backend import TRITON

BACKENDS.register("triton", TRITON)
BACKENDS.register("mamba_cuda", MAMBA_CUDA)
BACKENDS.register("cpu", CPU)
BACKENDS.register("chunked", CHUNKED)
BACKENDS.register("reference", REFERENCE)
backend_from_environment()

__all__ = [
    "active_backend",
    "available_backends",
    "causal_conv1d",
    "conv_flops",
    "grid_conv2d",
    "scan_flops",
    "selective_scan",
    "use_backend",
]
