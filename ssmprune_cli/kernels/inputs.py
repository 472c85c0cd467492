"""What the ops hand to a backend, and the parameters of Mamba blocks in the form that the fused ops take.

Glossary: as in op.py; G scan directions, R rank of the step projection, M tokens that only convolutions see, d model
width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

PANEL = 64  # columns of a weight that lie together in `pack_block`, as in csrc/blocks.c
_TILE = 16  # columns of bfloat16 weights are padded to a multiple of it, as in csrc/product.h


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

    def block(self, dim: int, dtype: torch.dtype) -> int:
        """Values that `pack_block` gives for a block of a model in `dtype` and `dim` wide."""
        again = _words(self.dt_rank + 2 * self.d_state, self.d_inner, dtype) if dtype == torch.bfloat16 else 0
        large = 2 * _words(self.d_inner, dim, dtype) + _words(dim, self.d_inner, dtype)
        return dim + large + self.directions * (again + self.inner)


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


def pack_routes(dt_weight: Tensor, A: Tensor, bias: Tensor, D: Tensor) -> Tensor:
    """The parameters of G routes as `routed_scans` takes them, (G, E (R + N + 2)), float32 at least.

    Of each the weight of the step projection (R, E) and A (N, E), given as (G, E, R) and (G, E, N), and the steps' bias
    and D, (G, E).
    """
    parts = [_wide(dt_weight).transpose(1, 2).flatten(1), _wide(A).transpose(1, 2).flatten(1), _wide(bias), _wide(D)]
    return torch.cat(parts, dim=1)


def pack_block(norm: Tensor, in_proj: Tensor, out_proj: Tensor, directions: Sequence[InnerParameters]) -> Tensor:
    """The parameters of a block as `mamba_blocks` takes them, (`BlockSizes.block`,), float32 at least.

    norm (d,), in_proj (2E, d) and out_proj (d, E) are weights. They follow each other, and then comes what `pack_inner`
    gives; in_proj's two halves and out_proj are in panels: PANEL outputs at a time, (inputs, PANEL). Weights of a
    bfloat16 model stay as they are, in pairs: see `_paired`. Before `pack_inner`'s they have each direction's x_weight
    once more.
    """
    x_proj, z_proj = in_proj.chunk(2)
    inner = pack_inner(directions).flatten()
    if in_proj.dtype != torch.bfloat16:
        return torch.cat([_wide(norm), *_panels(x_proj), *_panels(z_proj), *_panels(out_proj), inner])
    large = [_paired(panel) for weight in (x_proj, z_proj, out_proj) for panel in weight.split(PANEL)]
    return torch.cat([_wide(norm), *large, *(_paired(own.x_weight) for own in directions), inner])


def unpack_block(packed: Tensor, dim: int, sizes: BlockSizes, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """norm, in_proj, out_proj and inner of what `pack_block` gives for a model in `dtype`; projections are copies."""
    E, G = sizes.d_inner, sizes.directions
    parts = [dim, _words(E, dim, dtype), _words(E, dim, dtype), _words(dim, E, dtype), G * sizes.inner]
    again = len(packed) - sum(parts)  # bfloat16 weights that are in `inner` too
    norm, x_proj, z_proj, out_proj, _, inner = packed.split([*parts[:-1], again, parts[-1]])
    whole = _whole_of_pairs if dtype == torch.bfloat16 else _whole
    return norm, torch.cat([whole(x_proj, E, dim), whole(z_proj, E, dim)]), whole(out_proj, dim, E), inner.view(G, -1)


def _panels(weight: Tensor) -> Iterator[Tensor]:
    return (panel.t().flatten() for panel in _wide(weight).split(PANEL))


def _whole(panels: Tensor, outputs: int, inputs: int) -> Tensor:
    """(outputs, inputs) of the panels in a row."""
    parts = panels.split([inputs * height for height in _heights(outputs)])
    return torch.cat([part.view(inputs, -1).t() for part in parts])


def _paired(weight: Tensor) -> Tensor:
    """A bfloat16 weight (outputs, inputs) as (inputs / 2, outputs, 2), with zeros up to an even number of inputs and to
    a multiple of 16 outputs. Two values go for one of float32, whose type the result has, only for copying it."""
    padded = functional.pad(weight, (0, weight.shape[1] % 2, 0, -len(weight) % _TILE))
    pairs: Tensor = padded.unflatten(1, (-1, 2)).transpose(0, 1)
    return pairs.flatten().view(torch.float32)


def _whole_of_pairs(panels: Tensor, outputs: int, inputs: int) -> Tensor:
    """(outputs, inputs) of the panels in a row."""
    parts = (
        panels.contiguous()
        .view(torch.bfloat16)
        .split([2 * _words(height, inputs, torch.bfloat16) for height in _heights(outputs)])
    )
    rows = [part.view((inputs + 1) // 2, -1, 2).transpose(0, 1).flatten(1) for part in parts]
    return torch.cat(rows)[:outputs, :inputs]


def _words(outputs: int, inputs: int, dtype: torch.dtype) -> int:
    """Values of float32, or as much memory, for a weight of a model in `dtype`."""
    return (inputs + 1) // 2 * (outputs + -outputs % _TILE) if dtype == torch.bfloat16 else outputs * inputs


def _heights(outputs: int) -> list[int]:
    """Outputs of each panel."""
    return [PANEL] * (outputs // PANEL) + [outputs % PANEL] * (outputs % PANEL > 0)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
