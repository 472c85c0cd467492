"""What a kernel backend is, and the two in plain PyTorch that every machine has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ssmprune_cli.kernels.inputs import (
    GRADIENTS,
    SSD_GRADIENTS,
    BlocksInputs,
    Gradients,
    GridConvInputs,
    InnerInputs,
    LinearInputs,
    Moved,
    MoveInputs,
    OrderInputs,
    RoutedInputs,
    ScanInputs,
    SsdInputs,
)
from ssmprune_cli.kernels.pytorch import (
    chunked_scan,
    chunked_ssd,
    composed,
    eager,
    prune,
    reference_scan,
    reference_ssd,
    scan_gradients,
    ssd_gradients,
)


class Backend(ABC):
    """One implementation of the scan, forward and backward, and of the ops around it."""

    name: str
    skips_reading = False  # whether `scan` itself leaves out tokens that nobody reads; if not, it is given no `read`
    carries_states = True  # whether the scan takes an initial state, and gradients of the last one
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
    def scan_with_states(self, inputs: ScanInputs, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
        """What `scan` gives, the last state (B, E, N) in float32 at least, and states (B, K, N, E) that the backward
        pass then need not compute again: K is `kept_states`, or 0 unless `keep` says that there will be one."""

    def kept_states(self, length: int) -> int:
        """How many states of a sequence `scan_with_states` keeps."""
        return 0

    @abstractmethod
    def scan_backward(
        self, grad: Tensor, inputs: ScanInputs, states: Tensor | None = None, d_last: Tensor | None = None
    ) -> Gradients:
        """Gradients in the order of `GRADIENTS`; None where the input is.

        `grad` (B, L, E) has zeros at tokens that were not read, `d_last` (B, E, N) is the last state's, if it has one.
        `states` is what `scan_with_states` kept, if it did.
        """

    # What follows is plain PyTorch unless a backend has something faster.

    def ssd(self, inputs: SsdInputs) -> tuple[Tensor, Tensor]:
        """Mamba-2's scan: y (B, L, H, P), and the last state (B, H, P, N) in float32 at least."""
        y, last = chunked_ssd(_widened(inputs))
        return y.to(inputs.x.dtype), last

    def ssd_backward(self, grad: Tensor, inputs: SsdInputs, d_last: Tensor | None) -> Gradients:
        """Gradients in the order of `SSD_GRADIENTS`; None where the input is."""
        found = ssd_gradients(eager.wide(grad), _widened(inputs), d_last)
        return _narrowed(found, inputs, SSD_GRADIENTS)

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

    def score_tokens(self, ys: Sequence[Tensor], kind: str) -> Tensor:
        """Scores (B, L) of tokens from their scan outputs."""
        return prune.score_tokens(ys, kind)

    def order_tokens(self, inputs: OrderInputs) -> Tensor:
        """Rows of the tokens that stay and, if wanted, of the others, (B, K) or (B, L) int64."""
        return prune.order_tokens(inputs)

    def move_tokens(self, inputs: MoveInputs) -> Moved:
        """Kept and dropped tokens, in the order that `order_tokens` gave."""
        return prune.move_tokens(inputs)

    def mamba_inner(self, inputs: InnerInputs) -> Tensor:
        """The inside of a Mamba block, (B, L, E)."""
        return composed.mamba_inner(self, inputs)

    def inner_composed(self, inputs: InnerInputs) -> str | None:
        """Why a backend that `fuses` computes `mamba_inner` of these op by op; None if it does not."""
        return None

    def routed_scans(self, inputs: RoutedInputs) -> Tensor:
        """The sum of the scans along several routes, (B, L, E). On GPUs no session asks for it: see docs/kernels.md."""
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
        """A linear layer in float32, (..., outputs). On GPUs this is PyTorch's: cuBLAS is what a kernel would have to
        beat, and weights there need no other order."""
        return composed.linear(inputs)

    def has_dots(self) -> bool:
        """Whether products of bytes go by an instruction of the processor's for them."""
        return False

    def linear_int8(self, inputs: LinearInputs) -> Tensor:
        """A linear layer in eight bits, (..., outputs)."""
        return composed.linear_int8(inputs)


def no_states(inputs: ScanInputs) -> Tensor:
    """What `scan_with_states` keeps if it keeps none."""
    batch, _, channels = inputs.u.shape
    return inputs.u.new_empty(batch, 0, inputs.A.shape[1], channels, dtype=torch.float32)


class PyTorchBackend(Backend):
    """Runs anywhere that PyTorch does, in any floating-point precision."""

    def __init__(
        self,
        name: str,
        scan: Callable[[ScanInputs], tuple[Tensor, Tensor]],
        ssd: Callable[[SsdInputs], tuple[Tensor, Tensor]],
    ) -> None:
        self.name = name
        self._scan = scan
        self._ssd = ssd

    def missing(self) -> str | None:
        return None

    def accepts(self, example: Tensor, inner: int) -> bool:
        return example.is_floating_point()

    def scan(self, inputs: ScanInputs) -> Tensor:
        return self._scan(_widened(inputs))[0].to(inputs.u.dtype)

    def scan_with_states(self, inputs: ScanInputs, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
        y, last = self._scan(_widened(inputs))
        return y.to(inputs.u.dtype), last, no_states(inputs)

    def ssd(self, inputs: SsdInputs) -> tuple[Tensor, Tensor]:
        y, last = self._ssd(_widened(inputs))
        return y.to(inputs.x.dtype), last

    def scan_backward(
        self, grad: Tensor, inputs: ScanInputs, states: Tensor | None = None, d_last: Tensor | None = None
    ) -> Gradients:
        found = scan_gradients(eager.wide(grad), _widened(inputs), d_last)
        return _narrowed(found, inputs, GRADIENTS)


Inputs = TypeVar("Inputs", ScanInputs, SsdInputs)


def _widened(inputs: Inputs) -> Inputs:
    """Every tensor in float32 at least."""
    wide: dict[str, Any] = {n: eager.wide(v) for n, v in inputs._asdict().items() if isinstance(v, Tensor)}
    return inputs._replace(**wide)


def _narrowed(found: Gradients, inputs: ScanInputs | SsdInputs, names: Sequence[str]) -> Gradients:
    """Gradients in the dtypes of the inputs called `names`."""
    given = (getattr(inputs, name) for name in names)
    return tuple(
        None if gradient is None or tensor is None else gradient.to(tensor.dtype)
        for gradient, tensor in zip(found, given, strict=True)
    )


REFERENCE = PyTorchBackend("reference", reference_scan, reference_ssd)
CHUNKED = PyTorchBackend("chunked", chunked_scan, chunked_ssd)
