"""What the ops hand to a backend.

Glossary: as in op.py; G scan directions, R rank of the step projection, M tokens that only convolutions see, d model
width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

Gradients = tuple[Tensor | None, ...]  # None where the input is None
# What scans have gradients for, in the order in which backends give them.
GRADIENTS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "shift", "gap_delta", "initial_state")
SSD_GRADIENTS = ("x", "dt", "A", "B", "C", "D", "dt_bias", "shift", "gap_delta", "initial_state")


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
    initial_state: Tensor | None = None


class SsdInputs(NamedTuple):
    """Inputs of one scan of Mamba-2; shapes as in `ops.ssd.ssd_scan`."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    dt_bias: Tensor | None
    dt_softplus: bool
    shift: Tensor | None
    gap: Tensor | None
    gap_delta: Tensor | None
    initial_state: Tensor | None


class GridConvInputs(NamedTuple):
    """Inputs of a convolution over a grid; shapes as in `conv_op.grid_conv2d`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    rows: int
    columns: int
    positions: Tensor | None
    outputs: int


class InnerInputs(NamedTuple):
    """Inputs of the inside of a Mamba block; shapes as in `fused_op.mamba_inner`."""

    xz: Tensor
    parameters: Tensor
    d_state: int
    d_conv: int
    dt_rank: int
    gap: Tensor | None
    gap_delta: Tensor | None
    context: Tensor | None
    sources: Tensor | None
    read: Tensor | None
    cells: Tensor | None
    size: Tensor | None
    mass: Tensor | None
    scale: float
    products: Tensor | None = None

    @property
    def channels(self) -> int:
        return self.xz.shape[2] // 2


class RoutedInputs(NamedTuple):
    """Inputs of scans along several routes; shapes as in `routes_op.routed_scans`."""

    u: Tensor
    projected: Tensor
    parameters: Tensor
    d_state: int
    order: Tensor
    rows: Tensor | None
    extra_B: Tensor | None
    gap: Tensor | None
    gap_delta: Tensor | None


class BlocksInputs(NamedTuple):
    """Inputs of several Mamba blocks; shapes as in `fused_op.mamba_blocks`."""

    hidden: Tensor
    residual: Tensor | None
    parameters: Tensor
    sizes: Sequence[int]
    gap: Tensor | None
    gap_delta: Tensor | None
    context: Tensor | None
    sources: Tensor | None
    read: Tensor | None
    cells: Tensor | None
    size: Tensor | None
    mass: Tensor | None
    scale: float
    eps: float
    wants_y: bool


def tokens_and_steps(length: int, sources: Sequence[int] | None, cells: object) -> tuple[int, int]:
    """How many tokens a fused op convolves, and how many steps its scans take, with `sources` of this shape."""
    tokens = length if sources is None else sources[2]
    return tokens, length if cells is not None else tokens


class LinearInputs(NamedTuple):
    """Inputs of a linear layer; shapes as in `linear_op.linear`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    outputs: int


class OrderInputs(NamedTuple):
    """Inputs of the order of tokens at a prune point; shapes as in `ops.prune.order_tokens`."""

    score: Tensor
    positions: Tensor
    live: Tensor | None
    protected: Sequence[int]
    kept: int
    others: bool


class MoveInputs(NamedTuple):
    """Inputs of the move at a prune point; shapes as in `ops.prune.move_tokens`."""

    hidden: Tensor
    residual: Tensor | None
    positions: Tensor
    order: Tensor
    kept: int
    older: Tensor | None
    older_positions: Tensor | None


class Moved(NamedTuple):
    """What such a move gives, see there; without a residual stream in, `residual` has no entries."""

    hidden: Tensor
    residual: Tensor
    positions: Tensor
    gaps: Tensor
    dropped: Tensor
    dropped_positions: Tensor
