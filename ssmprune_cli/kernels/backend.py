"""What a kernel backend is, and which one runs."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ssmprune_cli.errors import KernelError
from ssmprune_cli.kernels import eager
from ssmprune_cli.registry import Registry

Gradients = tuple[Tensor | None, ...]


class ScanInputs(NamedTuple):
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
    read: Tensor | None = None


class InnerParameters(NamedTuple):
    """The parameters of a Mamba block's inside in one scan direction; A is -exp(A_log)."""

    conv_weight: Tensor  # (E, K)
    x_weight: Tensor  # (R + 2N, E)
    dt_weight: Tensor  # (E, R)
    A: Tensor  # (E, N)
    conv_bias: Tensor  # (E,), as the other two
    dt_bias: Tensor
    D: Tensor


class InnerInputs(NamedTuple):
    """Inputs of the inside of a Mamba block; shapes as in `inner_op.mamba_inner`."""

    xz: Tensor
    parameters: Tensor
    d_state: int
    d_conv: int
    dt_rank: int
    gap: Tensor | None
    gap_delta: Tensor | None
    context: Tensor | None
    sources: Tensor | None
    scale: float

    @property
    def channels(self) -> int:
        return self.xz.shape[2] // 2

    def unpacked(self, direction: int) -> InnerParameters:
        """The parameters of one direction, as views."""
        E, P = self.channels, self.dt_rank + 2 * self.d_state
        rows = (self.d_conv, P, self.dt_rank, self.d_state, 1, 1, 1)
        taps, x_weight, dt_weight, A, *vectors = self.parameters[direction].split([E * each for each in rows])
        return InnerParameters(
            taps.view(-1, E).t(), x_weight.view(E, P).t(), dt_weight.view(-1, E).t(), A.view(-1, E).t(), *vectors
        )


class Backend(ABC):
    """One implementation of the scan, forward and backward, and of the ops around it."""

    name: str
    skips_reading = False  # whether `scan` itself leaves out tokens that nobody reads; if not, it is given no `read`
    fuses_inner = False  # whether `mamba_inner` is faster than the ops that it is made of

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
        """y (B, L, E), or (B, K, E) with `read`."""

    @abstractmethod
    def scan_backward(self, grad: Tensor, inputs: ScanInputs) -> Gradients:
        """Gradients of u, delta, A, B, C, D, z, delta_bias, shift, gap_delta; None where the input is None.

        `grad` (B, L, E) has zeros at tokens that were not read.
        """

    # What follows is plain PyTorch unless a backend has something faster.

    def conv(self, x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
        """silu(depthwise causal convolution), (B, L, E)."""
        return eager.conv_silu(x, weight, bias, reverse)

    def conv_backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, reverse: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of x, weight and bias."""
        return eager.conv_gradients(grad, x, weight, bias, reverse)

    def sparse_conv(self, x: Tensor, context: Tensor, sources: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """silu(convolution that meets the rows `sources` of x followed by context), (B, L, E)."""
        return eager.sparse_conv_silu(x, context, sources, weight, bias)

    def sparse_conv_backward(
        self, grad: Tensor, x: Tensor, context: Tensor, sources: Tensor, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of x, context, weight and bias."""
        return eager.sparse_conv_gradients(grad, x, context, sources, weight, bias)

    def grid_conv(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: int,
        columns: int,
        positions: Tensor | None,
        outputs: int,
    ) -> Tensor:
        """silu(depthwise convolution over the grid) at the places of the first tokens, (B, outputs, E)."""
        return eager.grid_conv_silu(x, weight, bias, rows, columns, positions, outputs)

    def add_rms_norm(
        self, hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """(normed, stream), (B, L, d) each."""
        return eager.add_rms_norm(hidden, residual, weight, eps)

    def add_rms_norm_backward(
        self, d_normed: Tensor, d_stream: Tensor, stream: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the sum, in the dtype of `stream`, and of weight."""
        return eager.add_rms_norm_gradients(d_normed, d_stream, stream, weight, eps)

    def gated_sum(self, ys: Sequence[Tensor], z: Tensor, scale: float) -> Tensor:
        """(sum of ys) * silu(z) * scale, (B, L, E)."""
        return eager.gated_sum(ys, z, scale)

    def gated_sum_backward(self, grad: Tensor, ys: Sequence[Tensor], z: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Gradients of each of ys, which are all the same, and of z."""
        return eager.gated_sum_gradients(grad, ys, z, scale)

    def mamba_inner(self, inputs: InnerInputs) -> Tensor:
        """The inside of a Mamba block, (B, L, E)."""
        x, z = inputs.xz.chunk(2, dim=-1)  # (B, L, E) each
        ys = []
        for g in range(len(inputs.parameters)):
            own = inputs.unpacked(g)
            if inputs.context is None or inputs.sources is None:
                u = self.conv(x, own.conv_weight, own.conv_bias, g == 1)
            else:
                u = self.sparse_conv(x, inputs.context, inputs.sources[g], own.conv_weight, own.conv_bias)
            projected = functional.linear(u, own.x_weight.to(u.dtype))
            rank_values, B, C = projected.split([inputs.dt_rank, inputs.d_state, inputs.d_state], dim=-1)
            delta = functional.linear(rank_values, own.dt_weight.to(u.dtype))
            gap = None if inputs.gap is None else inputs.gap[g]
            gap_delta = None if inputs.gap_delta is None else inputs.gap_delta[g]
            bias = own.dt_bias
            scan = ScanInputs(u, delta, own.A, B, C, own.D, None, bias, True, None, gap, gap_delta, reverse=g == 1)
            ys.append(self.scan(scan))
        return self.gated_sum(ys, z, inputs.scale)


# In order of preference; `kernels/__init__.py` fills it.
BACKENDS: Registry[Backend] = Registry("kernel backend")
_chosen = "auto"
_picked: dict[tuple[torch.dtype, str, int], Backend] = {}  # what `pick` has found since the last choice


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
    _picked.clear()


def available_backends() -> dict[str, str]:
    """Every backend with "available" or the reason why it is missing."""
    return {name: backend.missing() or "available" for name, backend in BACKENDS.items()}


def backends_for(example: Tensor) -> list[str]:
    """Names of the available backends that compute in the dtype and on the device of `example`, best first."""
    fitting = ((name, backend) for name, backend in BACKENDS.items() if backend.accepts(example, 1))
    return [name for name, backend in fitting if backend.missing() is None]


def active_backend(device: torch.device | str = "cpu") -> str:
    """The backend that float32 tensors on `device` are computed with."""
    return pick(torch.empty(0, device=device), 1).name


def refused_backends(device: torch.device | str = "cpu") -> dict[str, str]:
    """Better backends than the active one, each with the reason why it is not used; empty when one was asked for."""
    refused: dict[str, str] = {}
    if _chosen == "auto":
        example = torch.empty(0, device=device)
        for name, backend in BACKENDS.items():
            if name == active_backend(device):
                break
            fits = backend.accepts(example, 1)
            refused[name] = (backend.missing() if fits else None) or f"does not compute on {example.device.type}"
    return refused


def pick(example: Tensor, inner: int) -> Backend:
    """The backend for tensors like `example` with `inner` states or taps.

    Raises KernelError if the one asked for by name does not take them.
    """
    key = (example.dtype, example.device.type, inner)
    if key not in _picked:
        _picked[key] = _find(example, inner)
    return _picked[key]


def _find(example: Tensor, inner: int) -> Backend:
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
