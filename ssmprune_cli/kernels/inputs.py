"""What the ops hand to a backend, and the parameters of Mamba blocks in the form that the fused ops take.

Glossary: as in op.py; G scan directions, R rank of the step projection, M tokens that only convolutions see, d model
width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

PANEL = 64  # columns of a weight that lie together in `pack_block`, as in csrc/blocks.c


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


class GridConvInputs(NamedTuple):
    """Inputs of a convolution over a grid; shapes as in `conv_op.grid_conv2d`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    rows: int
    columns: int
    positions: Tensor | None
    outputs: int


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
    scale: float

    @property
    def channels(self) -> int:
        return self.xz.shape[2] // 2


class BlocksInputs(NamedTuple):
    """Inputs of several Mamba blocks; shapes as in `fused_op.mamba_blocks`."""

    hidden: Tensor
    residual: Tensor | None
    parameters: Sequence[Tensor]
    sizes: Sequence[int]
    gap: Tensor | None
    gap_delta: Tensor | None
    context: Tensor | None
    sources: Tensor | None
    scale: float
    eps: float
    wants_y: bool


class BlockSizes(NamedTuple):
    """Sizes of a Mamba block beside its width: E, N, K, R and G."""

    d_inner: int
    d_state: int
    d_conv: int
    dt_rank: int
    directions: int

    @property
    def inner(self) -> int:
        """Parameters of the inside, in one direction."""
        return self.d_inner * (self.d_conv + 2 * self.dt_rank + 3 * self.d_state + 3)


def pack_inner(directions: Sequence[InnerParameters]) -> Tensor:
    """The parameters of all directions as `mamba_inner` takes them, (G, n), float32 at least.

    Of each direction the convolution's taps (K, E), x_weight (E, R + 2N), dt_weight (R, E), A (N, E), and conv_bias,
    dt_bias and D (E,): neighbouring channels side by side, and neighbouring results of a product of matrices.
    """
    rows = [
        torch.cat([*(_wide(matrix).t().flatten() for matrix in own[:4]), *map(_wide, own[4:])]) for own in directions
    ]
    return torch.stack(rows)


def unpack_inner(packed: Tensor, sizes: BlockSizes) -> InnerParameters:
    """One direction's row of what `pack_inner` gives, as views."""
    E, P = sizes.d_inner, sizes.dt_rank + 2 * sizes.d_state
    rows = (sizes.d_conv, P, sizes.dt_rank, sizes.d_state, 1, 1, 1)
    taps, x_weight, dt_weight, A, *vectors = packed.split([E * each for each in rows])
    return InnerParameters(
        taps.view(-1, E).t(), x_weight.view(E, P).t(), dt_weight.view(-1, E).t(), A.view(-1, E).t(), *vectors
    )


def pack_block(norm: Tensor, in_proj: Tensor, out_proj: Tensor, inner: Tensor) -> Tensor:
    """The parameters of a block as `mamba_blocks` takes them, (n,), float32 at least.

    norm (d,), in_proj (2E, d) and out_proj (d, E) are weights; `inner` comes from `pack_inner`. They follow each other;
    in_proj's two halves and out_proj are in panels: PANEL outputs at a time, (inputs, PANEL).
    """
    x_proj, z_proj = in_proj.chunk(2)
    return torch.cat([_wide(norm), *_panels(x_proj), *_panels(z_proj), *_panels(out_proj), _wide(inner).flatten()])


def unpack_block(packed: Tensor, dim: int, sizes: BlockSizes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """norm, in_proj, out_proj and inner of what `pack_block` gives; the two projections are copies."""
    E, G = sizes.d_inner, sizes.directions
    norm, x_proj, z_proj, out_proj, inner = packed.split([dim, E * dim, E * dim, dim * E, G * sizes.inner])
    in_proj = torch.cat([_whole(x_proj, E, dim), _whole(z_proj, E, dim)])
    return norm, in_proj, _whole(out_proj, dim, E), inner.view(G, -1)


def _panels(weight: Tensor) -> Iterator[Tensor]:
    return (panel.t().flatten() for panel in _wide(weight).split(PANEL))


def _whole(panels: Tensor, outputs: int, inputs: int) -> Tensor:
    """(outputs, inputs) of the panels in a row."""
    heights = [PANEL] * (outputs // PANEL) + [outputs % PANEL] * (outputs % PANEL > 0)
    parts = panels.split([inputs * height for height in heights])
    return torch.cat([part.view(inputs, -1).t() for part in parts])


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
