"""The parameters of Mamba blocks and of scans along routes in the form that the fused ops take.

Glossary: as in inputs.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

PANEL = 64  # columns of a weight that lie together in `pack_block`, as in csrc/blocks.c
FLOAT_PARTS = 3  # values of bfloat16 that make up a float32
_OUTPUTS, _INPUTS = 16, 32  # of a tile, as in csrc/tiles.h
_FOUR = 4  # inputs of an output that lie together, as in csrc/bytes.h


class EightBit(NamedTuple):
    """A weight of which output p is values[p] * scale[p]."""

    values: Tensor  # (outputs, inputs), int8
    scale: Tensor  # (outputs,), float32


Weight = Tensor | EightBit


class InnerParameters(NamedTuple):
    """The parameters of a Mamba block's inside in one scan direction; A is -exp(A_log)."""

    conv_weight: Tensor  # (E, K)
    x_weight: Weight  # (R + 2N, E)
    dt_weight: Tensor  # (E, R)
    A: Tensor  # (E, N)
    conv_bias: Tensor  # (E,), as the other two
    dt_bias: Tensor
    D: Tensor


class BlockSizes(NamedTuple):
    """Sizes of a Mamba block beside its width: E, N, K, R and G; and in how many values of bfloat16 `pack_block` puts
    each weight of its products of matrices: 1 that it is, 3 that make up a float32, or 0 to leave them as they are.
    With `eight_bits` 1, in_proj and out_proj are in eight bits instead; with 2, x_weight too."""

    d_inner: int
    d_state: int
    d_conv: int
    dt_rank: int
    directions: int
    parts: int = 0
    eight_bits: int = 0

    @property
    def projected(self) -> int:
        """What the scan's inputs are made of, for each token: R + 2N."""
        return self.dt_rank + 2 * self.d_state

    @property
    def inner(self) -> int:
        """Values that `pack_inner` gives for one direction."""
        return self.d_inner * (self.d_conv + self.projected + self.dt_rank + self.d_state + 3)

    def block(self, dim: int) -> int:
        """Values that `pack_block` gives for a block of a model `dim` wide."""
        large = 2 * self.words(self.d_inner, dim) + self.words(dim, self.d_inner)
        others = self.inner - self.d_inner * self.projected
        return dim + large + self.directions * (others + self.x_words)

    def words(self, outputs: int, inputs: int) -> int:
        """Values of float32, or as much memory, that `pack_block` gives for a large weight (outputs, inputs)."""
        if self.eight_bits:
            return byte_words(outputs, inputs)
        return tiled_words(outputs, inputs, self.parts) if self.parts else outputs * inputs

    @property
    def x_words(self) -> int:
        """The same for x_weight."""
        if self.eight_bits == 1:
            return self.projected * self.d_inner
        return self.words(self.projected, self.d_inner)


def pack_inner(directions: Sequence[InnerParameters]) -> Tensor:
    """The parameters of all directions as `mamba_inner` takes them, (G, n), float32 at least.

    Of each direction the convolution's taps (K, E), x_weight (E, R + 2N), dt_weight (R, E), A (N, E), and conv_bias,
    dt_bias and D (E,): neighbouring channels side by side, and neighbouring results of a product of matrices.
    """
    return torch.stack([_direction(own, parts=0) for own in directions])


def unpack_inner(packed: Tensor, sizes: BlockSizes) -> InnerParameters:
    """One direction's row of what `pack_inner` gives, as views."""
    E, P = sizes.d_inner, sizes.projected
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


def pack_block(
    norm: Tensor, in_proj: Weight, out_proj: Weight, directions: Sequence[InnerParameters], parts: int = 0
) -> Tensor:
    """The parameters of a block as `mamba_blocks` takes them, (`BlockSizes.block`,), float32 at least.

    norm (d,), in_proj (2E, d) and out_proj (d, E) are weights. They follow each other, and then comes what `pack_inner`
    gives; in_proj's two halves and out_proj are in panels: PANEL outputs at a time, (inputs, PANEL). With `parts`, see
    `BlockSizes`, these three and each direction's x_weight are `_tiled`; those that are EightBit are `_bytes`.
    """
    large = (*halves(in_proj), out_proj)
    projections = [_packed(weight, parts) for weight in large]
    return torch.cat([_wide(norm), *projections, *(_direction(own, parts) for own in directions)])


def pack_linear(weight: Weight) -> Tensor:
    """A weight (outputs, inputs) as `linear` takes it: in FLOAT_PARTS, (`tiled_words`,), or one in eight bits,
    (`byte_words`,)."""
    return _bytes(weight) if isinstance(weight, EightBit) else _tiled(weight, FLOAT_PARTS)


def unpack_linear(packed: Tensor, outputs: int, inputs: int) -> Tensor:
    """(outputs, inputs) of what `pack_linear` gives of a float32 weight."""
    return _untiled(packed, outputs, inputs, FLOAT_PARTS)


def unpack_bytes(packed: Tensor, outputs: int, inputs: int) -> EightBit:
    """What `pack_linear` was given in eight bits."""
    fours = -(-inputs // _FOUR)
    panels = packed.contiguous().view(-1, PANEL * (fours + 2))
    values = panels[:, : PANEL * fours].contiguous().view(torch.int8).view(-1, fours, PANEL, _FOUR)
    scale = panels[:, PANEL * fours : PANEL * (fours + 1)].flatten()
    in_order = values.permute(0, 2, 1, 3).reshape(-1, fours * _FOUR)  # (outputs, inputs), padded
    return EightBit(in_order[:outputs, :inputs], scale[:outputs])


def byte_words(outputs: int, inputs: int) -> int:
    """Values of float32 that a weight (outputs, inputs) in eight bits takes the room of, as in csrc/bytes.h."""
    return -(-outputs // PANEL) * PANEL * (-(-inputs // _FOUR) + 2)


def tiled_words(outputs: int, inputs: int, parts: int) -> int:
    """Values of float32 that a weight (outputs, inputs) in `parts` values of bfloat16 takes the room of."""
    return (outputs + -outputs % _OUTPUTS) * (inputs + -inputs % _INPUTS) * parts // 2


class UnpackedBlock(NamedTuple):
    """What `pack_block` was given; `inner` as `pack_inner` gives it, `x_weights` those in eight bits, if they are."""

    norm: Tensor
    in_proj: Weight
    out_proj: Weight
    inner: Tensor
    x_weights: tuple[EightBit, ...]


def unpack_block(packed: Tensor, dim: int, sizes: BlockSizes) -> UnpackedBlock:
    """What `pack_block` was given; mostly copies."""
    E, P, G = sizes.d_inner, sizes.projected, sizes.directions
    large = [(E, dim), (E, dim), (dim, E)]
    inner = G * (sizes.inner - E * P + sizes.x_words)
    norm, *projections, directions = packed.split([dim, *(sizes.words(*shape) for shape in large), inner])
    whole = partial(_unpacked, sizes=sizes)
    x_proj, z_proj, out_proj = (whole(each, *shape) for each, shape in zip(projections, large, strict=True))
    rows, x_weights = [], []
    for direction in directions.view(G, -1):
        before = E * sizes.d_conv
        taps, x_weight, others = direction.tensor_split([before, before + sizes.x_words])
        if sizes.eight_bits == 2:
            x_weights.append(unpack_bytes(x_weight, P, E))
            x_weight = _transposed(_floats(x_weights[-1]))
        elif sizes.parts:
            x_weight = _transposed(_untiled(x_weight, P, E, sizes.parts))
        rows.append(torch.cat([taps, x_weight, others]))
    return UnpackedBlock(norm, _joined(x_proj, z_proj), out_proj, torch.stack(rows), tuple(x_weights))


def _direction(own: InnerParameters, parts: int) -> Tensor:
    """One row of `pack_inner`, or of `pack_block`'s directions."""
    x_weight = own.x_weight
    if isinstance(x_weight, EightBit):
        first = _bytes(x_weight)
    else:
        first = _tiled(x_weight, parts) if parts else _transposed(x_weight)
    others = [_transposed(own.dt_weight), _transposed(own.A), *map(_wide, own[4:])]
    return torch.cat([_transposed(own.conv_weight), first, *others])


def halves(weight: Weight) -> tuple[Weight, ...]:
    """The first and the second half of the outputs."""
    if isinstance(weight, EightBit):
        return tuple(map(EightBit, weight.values.chunk(2), weight.scale.chunk(2)))
    return weight.chunk(2)


def _joined(first: Weight, second: Weight) -> Weight:
    if isinstance(first, EightBit) and isinstance(second, EightBit):
        return EightBit(torch.cat([first.values, second.values]), torch.cat([first.scale, second.scale]))
    assert isinstance(first, Tensor) and isinstance(second, Tensor)
    return torch.cat([first, second])


def _floats(weight: EightBit) -> Tensor:
    return weight.values * weight.scale[:, None]


def _packed(weight: Weight, parts: int) -> Tensor:
    if isinstance(weight, EightBit):
        return _bytes(weight)
    return _tiled(weight, parts) if parts else _panels(weight)


def _unpacked(packed: Tensor, outputs: int, inputs: int, sizes: BlockSizes) -> Weight:
    """A large weight (outputs, inputs) of `pack_block`'s."""
    if sizes.eight_bits:
        return unpack_bytes(packed, outputs, inputs)
    if sizes.parts:
        return _untiled(packed, outputs, inputs, sizes.parts)
    return _of_panels(packed, outputs, inputs)


def _bytes(weight: EightBit) -> Tensor:
    """A weight (outputs, inputs) in panels of PANEL outputs: (inputs / 4, PANEL, 4) values, then PANEL scales, then
    PANEL times 128 times the sum of an output's values, with zeros up to whole panels. It is called float32 only for
    copying it: see csrc/bytes.h."""
    outputs, inputs = weight.values.shape
    values = functional.pad(weight.values, (0, -inputs % _FOUR, 0, -outputs % PANEL))
    panels = values.unflatten(1, (-1, _FOUR)).unflatten(0, (-1, PANEL)).transpose(1, 2)  # (panels, fours, PANEL, 4)
    words = panels.contiguous().flatten(1).view(torch.float32)
    scale = functional.pad(weight.scale.float(), (0, -outputs % PANEL)).view(-1, PANEL)
    shift = 128 * values.sum(dim=1, dtype=torch.int32)
    return torch.cat([words, scale, shift.view(-1, PANEL).view(torch.float32)], dim=1).flatten()


def _panels(weight: Tensor) -> Tensor:
    """A weight (outputs, inputs), PANEL outputs at a time: (inputs, PANEL), and the last ones."""
    return torch.cat([_transposed(panel) for panel in weight.split(PANEL)])


def _of_panels(panels: Tensor, outputs: int, inputs: int) -> Tensor:
    """(outputs, inputs) of the panels in a row."""
    return torch.cat([panel.view(inputs, -1).t() for panel in panels.split(inputs * PANEL)])


def _tiled(weight: Tensor, parts: int) -> Tensor:
    """A weight (outputs, inputs) as (outputs / 16, inputs / 32, parts, 16, 16, 2), with zeros up to whole tiles: of
    each value the nearest one of bfloat16, the nearest one to the rest, and so on. Inputs k and k + 16 of 32 are
    together, behind them outputs. The result is called float32, each of which is two values, only for copying it."""
    outputs, inputs = weight.shape
    rest = functional.pad(weight, (0, -inputs % _INPUTS, 0, -outputs % _OUTPUTS))
    found = []
    for _ in range(parts):
        found.append(rest.bfloat16())
        rest = rest - found[-1].to(rest.dtype)
    tiles = torch.stack(found).unflatten(2, (-1, 2, _INPUTS // 2)).unflatten(1, (-1, _OUTPUTS))
    in_order: Tensor = tiles.permute(1, 3, 0, 5, 2, 4)  # from (parts, outputs / 16, 16, inputs / 32, 2, 16)
    return in_order.flatten().view(torch.float32)


def _untiled(tiles: Tensor, outputs: int, inputs: int, parts: int) -> Tensor:
    """(outputs, inputs) of what `_tiled` gives, float32."""
    values = tiles.contiguous().view(torch.bfloat16).float()
    down, across = -(-outputs // _OUTPUTS), -(-inputs // _INPUTS)
    in_order = values.view(down, across, parts, _INPUTS // 2, _OUTPUTS, 2).permute(2, 0, 4, 1, 5, 3)
    each = in_order.reshape(parts, down * _OUTPUTS, across * _INPUTS)
    total = each[0]  # the largest first: so that nothing is lost
    for part in each[1:]:
        total = total + part
    return total[:outputs, :inputs]


def _transposed(weight: Tensor) -> Tensor:
    return _wide(weight).t().flatten()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
