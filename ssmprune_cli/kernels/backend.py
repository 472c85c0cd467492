"""What a kernel backend is, and which one runs."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ssmprune_cli.errors import KernelError
from ssmprune_cli.kernels import composed, eager
from ssmprune_cli.kernels.inputs import (
    BlocksInputs,
    GridConvInputs,
    InnerInputs,
    LinearInputs,
    RoutedInputs,
    ScanInputs,
)
from ssmprune_cli.registry import Registry

Gradients = tuple[Tensor | None, ...]


class Backend(ABC):
    """One implementation of the scan, forward and backward, and of the ops around it."""

    name: str
    skips_reading = False  # whether `scan` itself leaves out tokens that nobody reads; if not, it is given no `read`
    fuses = False  # whether the fused ops are faster than the ops that they are made of

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
    def scan_backward(self, grad: Tensor, inputs: ScanInputs, states: Tensor | None = None) -> Gradients:
        """Gradients of u, delta, A, B, C, D, z, delta_bias, shift, gap_delta; None where the input is None.

        `grad` (B, L, E) has zeros at tokens that were not read. `states` is what `scan_keeping` kept, if it did.
        """

    def kept_states(self, length: int) -> int:
        """How many states of a sequence `scan_keeping` keeps."""
        return 0

    def scan_keeping(self, inputs: ScanInputs) -> tuple[Tensor, Tensor]:
        """What `scan` gives, and states (B, `kept_states`, N, E) that the backward pass then need not compute again."""
        batch, _, channels = inputs.u.shape
        states = inputs.u.new_empty(batch, 0, inputs.A.shape[1], channels, dtype=torch.float32)
        return self.scan(inputs), states

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

    def grid_conv(self, inputs: GridConvInputs) -> Tensor:
        """silu(depthwise convolution over the grid) at the places of the first tokens, (B, outputs, E)."""
        return eager.grid_conv_silu(inputs)

    def grid_conv_backward(self, grad: Tensor, inputs: GridConvInputs) -> tuple[Tensor, ...]:
        """Gradients of x, weight and, if there is one, bias."""
        return eager.grid_conv_gradients(grad, inputs)

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
        return composed.mamba_inner(self, inputs)

    def routed_scans(self, inputs: RoutedInputs) -> Tensor:
        """The sum of the scans along several routes, (B, L, E)."""
        return composed.routed_scans(self, inputs)

    def block_parts(self, dim: int, d_inner: int, dtype: torch.dtype) -> int | None:
        """`BlockSizes.parts` that suit a model in `dtype`, `dim` wide and with scans of `d_inner` channels, or None if
        `mamba_blocks` is not faster for it than block by block."""
        return None

    def mamba_blocks(self, inputs: BlocksInputs) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden state and residual stream (B, L, d) after several Mamba blocks, and the last one's y, see there."""
        return composed.mamba_blocks(self, inputs)

    def suits_linear(self, rows: int, inputs: int, outputs: int) -> bool:
        """Whether `linear` is faster than PyTorch's for so many rows and so large a weight."""
        return False

    def linear(self, inputs: LinearInputs) -> Tensor:
        """A linear layer in float32, (..., outputs)."""
        return composed.linear(inputs)


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


def active_backend(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """The backend that tensors of `dtype` on `device` are computed with."""
    return pick(torch.empty(0, device=device, dtype=dtype), 1).name


def refused_backends(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, str]:
    """Better backends than the active one, each with the reason why it is not used; empty when one was asked for."""
    refused: dict[str, str] = {}
    if _chosen == "auto":
        example = torch.empty(0, device=device, dtype=dtype)
        for name, backend in BACKENDS.items():
            if name == active_backend(device, dtype):
                break
            if backend.accepts(example, 1):
                refused[name] = backend.missing() or "is used only when asked for by name"
            elif backend.accepts(example.float(), 1):
                refused[name] = f"does not compute in {dtype}"
            else:
                refused[name] = f"does not compute on {example.device.type}"
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
