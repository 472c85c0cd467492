"""What a kernel backend is, and which one runs."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ssmprune_cli.errors import KernelError
from ssmprune_cli.registry import Registry

Gradients = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class ScanInputs:
    """Inputs of one scan; shapes as in `op.selective_scan`."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    delta_softplus: bool
    shift: Tensor | None
    gap: Tensor | None
    gap_delta: Tensor | None
    reverse: bool


class Backend(ABC):
    """One implementation of the two ops, forward and backward."""

    name: str

    @property
    def automatic(self) -> bool:
        """Whether "auto" may choose it; if not, it has to be asked for by name."""
        return True

    @abstractmethod
    def missing(self) -> str | None:
        """Why it cannot be used on this machine; None if it can."""

    @abstractmethod
    def accepts(self, example: Tensor, inner: int) -> bool:
        """Whether it computes in this dtype and on this device, with `inner` states (scan) or taps (convolution)."""

    @abstractmethod
    def scan(self, inputs: ScanInputs) -> Tensor:
        """y (B, L, E)."""

    @abstractmethod
    def scan_backward(self, grad: Tensor, inputs: ScanInputs) -> Gradients:
        """Gradients of u, delta, A, B, C, D, z, delta_bias, shift, gap_delta; None where the input is None."""

    @abstractmethod
    def conv(self, x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
        """silu(depthwise causal convolution), (B, L, E)."""

    @abstractmethod
    def conv_backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, reverse: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of x, weight and bias."""


# In order of preference; `kernels/__init__.py` fills it.
BACKENDS: Registry[Backend] = Registry("kernel backend")
_chosen = "auto"


def use_backend(name: str) -> None:
    """Compute with the backend called `name` from now on; "auto" takes the best that is available and fits.

    Raises UsageError for an unknown name and KernelError if it is missing here, with the reason.
    """
    global _chosen
    if name != "auto":
        reason = BACKENDS.get(name).missing()
        if reason is not None:
            raise KernelError(f"kernel backend {name!r} cannot be used: {reason}", hint="See `ssmprune env`.")
    _chosen = name


def available_backends() -> dict[str, str]:
    """Every backend with "available" or the reason why it is missing."""
    return {name: backend.missing() or "available" for name, backend in BACKENDS.items()}


def active_backend() -> str:
    """The backend that float32 tensors on the CPU are computed with."""
    if _chosen != "auto":
        return _chosen
    return pick(torch.empty(0), 1).name


def pick(example: Tensor, inner: int) -> Backend:
    """The backend for tensors like `example` with `inner` states or taps.

    Raises KernelError if the one asked for by name does not take them.
    """
    if _chosen == "auto":
        fitting = (b for _, b in BACKENDS.items() if b.automatic and b.accepts(example, inner))
        return next(backend for backend in fitting if backend.missing() is None)
    backend = BACKENDS.get(_chosen)
    if not backend.accepts(example, inner):
        given = f"{example.dtype} on {example.device.type} with {inner} states or taps"
        raise KernelError(f"kernel backend {_chosen!r} does not compute {given}")
    return backend


def backend_from_environment() -> None:
    """Honour SSMPRUNE_BACKEND, so that a test or a bug report can pin a backend."""
    use_backend(os.environ.get("SSMPRUNE_BACKEND", "auto"))
