"""The fused ops as the ops that they are made of: what every backend can do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from ssmprune_cli.kernels.inputs import BlocksInputs, InnerInputs, LinearInputs, RoutedInputs, ScanInputs
from ssmprune_cli.kernels.packing import (
    BlockSizes,
    EightBit,
    Weight,
    halves,
    unpack_block,
    unpack_bytes,
    unpack_inner,
    unpack_linear,
)
from ssmprune_cli.kernels.products import unpack_products
from ssmprune_cli.kernels.pytorch import eight_bit

if TYPE_CHECKING:
    from ssmprune_cli.kernels.backend import Backend


def mamba_inner(backend: Backend, inputs: InnerInputs) -> Tensor:
    return backend.gated_sum(_scans(backend, inputs), inputs.xz[..., inputs.channels :], inputs.scale)


def _scans(backend: Backend, inputs: InnerInputs, x_weights: Sequence[EightBit] = ()) -> list[Tensor]:
    """The scan outputs of each direction, (B, L, E). `x_weights`: of each, if they are in eight bits."""
    x, context, pool = inputs.xz[..., : inputs.channels], inputs.context, _pool(inputs)  # (B, L, E)
    sizes = BlockSizes(x.shape[2], inputs.d_state, inputs.d_conv, inputs.dt_rank, len(inputs.parameters))
    if context is not None and inputs.sources is not None:  # all tokens that are convolved, and the rest
        tokens, both = inputs.sources.shape[2], torch.cat((x, context), dim=1)
        x, context = both.split([tokens, both.shape[1] - tokens], dim=1)
    growth = None if inputs.size is None or inputs.mass is None else inputs.mass * (inputs.size - 1)  # (B, S)
    ys = []
    for g, packed in enumerate(inputs.parameters):
        own, reverse = unpack_inner(packed, sizes), g == 1
        if context is None or inputs.sources is None:
            u = backend.conv(x, own.conv_weight, own.conv_bias, reverse)
        else:
            u = backend.sparse_conv(x, context, inputs.sources[g], own.conv_weight, own.conv_bias)
        convolved = u
        if pool is not None:
            u = (pool @ u.to(pool.dtype)).to(u.dtype)
        if inputs.products is None:
            projected = _product(u, x_weights[g] if x_weights else own.x_weight)
            rank_values, B, C = projected.split([inputs.dt_rank, inputs.d_state, inputs.d_state], dim=-1)
            dt_weight = own.dt_weight.to(u.dtype)
        else:
            products = unpack_products(inputs.products[g], sizes.d_inner, sizes.d_state, sizes.dt_rank)
            rank_values, B, C = products.project(u, sizes.d_state)
            dt_weight = products.dt_weight
        delta = functional.linear(rank_values, dt_weight)
        gap = growth if inputs.gap is None else inputs.gap[g]
        gap_delta = None if inputs.gap_delta is None else inputs.gap_delta[g]
        if growth is not None:
            B = B * (1 + growth).to(B.dtype)[..., None]
        D = own.D if pool is None else None
        y = backend.scan(ScanInputs(u, delta, own.A, B, C, D, None, own.dt_bias, True, None, gap, gap_delta, reverse))
        if inputs.read is not None:
            read = inputs.read[..., None].expand(-1, -1, u.shape[2])  # (B, L, E)
            y = y.gather(1, read) if pool is None else torch.addcmul(y, convolved.gather(1, read), own.D.to(y.dtype))
        ys.append(y)
    return ys


def _pool(inputs: InnerInputs) -> Tensor | None:
    """(B, L, T): the part of each token in the mean of each cell; a token that is not read counts `mass` times."""
    if inputs.cells is None or inputs.read is None or inputs.size is None or inputs.mass is None:
        return None
    assert inputs.sources is not None
    batch, length = inputs.cells.shape
    places = torch.arange(inputs.sources.shape[2], device=inputs.cells.device).expand(batch, -1).contiguous()  # (B, T)
    owner = torch.searchsorted(inputs.cells, places, right=True)
    part = inputs.mass.expand(owner.shape).scatter(1, inputs.read, 1.0)
    whole = 1 + inputs.mass * (inputs.size - 1)  # (B, L)
    rows = torch.arange(length, device=owner.device)[:, None]
    return (owner[:, None] == rows) * part[:, None] / whole[..., None]


def mamba_blocks(backend: Backend, inputs: BlocksInputs) -> tuple[Tensor, Tensor, Tensor]:
    sizes, hidden, residual = BlockSizes(*inputs.sizes), inputs.hidden, inputs.residual
    ys: list[Tensor] = []
    for block, packed in enumerate(inputs.parameters):
        norm, in_proj, out_proj, inner, x_weights = unpack_block(packed, hidden.shape[2], sizes)
        norm = norm.to(hidden.dtype)
        normed, residual = backend.add_rms_norm(hidden, residual, norm, inputs.eps)
        context = None
        if inputs.context is not None:
            context = _product(inputs.context * norm, halves(in_proj)[0])
        gap_delta = None if inputs.gap_delta is None else inputs.gap_delta[block]
        xz = _product(normed, in_proj)
        mass = None if inputs.mass is None else inputs.mass[block]
        lost = (inputs.gap, gap_delta, context, inputs.sources, inputs.read, inputs.cells, inputs.size, mass)
        given = InnerInputs(xz, inner, sizes.d_state, sizes.d_conv, sizes.dt_rank, *lost, inputs.scale)
        ys = _scans(backend, given, x_weights)
        hidden = _product(backend.gated_sum(ys, xz[..., sizes.d_inner :], inputs.scale), out_proj)
    assert residual is not None
    y = torch.stack(ys).sum(dim=0) if inputs.wants_y else hidden.new_empty(*hidden.shape[:2], 0)
    return hidden, residual, y


def _product(x: Tensor, weight: Weight) -> Tensor:
    if isinstance(weight, EightBit):
        return eight_bit.eight_bit_linear(x, weight)
    return functional.linear(x, weight.to(x.dtype))


def linear(inputs: LinearInputs) -> Tensor:
    weight = unpack_linear(inputs.weight, inputs.outputs, inputs.x.shape[-1])
    return functional.linear(inputs.x, weight, inputs.bias)


def linear_int8(inputs: LinearInputs) -> Tensor:
    weight = unpack_bytes(inputs.weight, inputs.outputs, inputs.x.shape[-1])
    return eight_bit.eight_bit_linear(inputs.x, weight, inputs.bias)


def routed_scans(backend: Backend, inputs: RoutedInputs) -> Tensor:
    u, projected, N = inputs.u, inputs.projected, inputs.d_state
    batch, _, E = u.shape
    R = projected.shape[3] - 2 * N
    total = u.new_zeros(u.shape, dtype=inputs.parameters.dtype)
    for g, packed in enumerate(inputs.parameters):
        dt_weight, A, bias, D = packed.split([R * E, N * E, E, E])
        order = inputs.order[g, :, :, None].expand(batch, -1, E)  # (B, L, E)
        steps = projected[:, :, g if projected.shape[2] > 1 else 0]  # (B, L, R + 2N)
        if inputs.rows is not None:
            steps = steps.gather(1, inputs.rows[g, :, :, None].expand(batch, -1, R + 2 * N))
        rank_values, B, C = steps.split([R, N, N], dim=-1)
        if inputs.extra_B is not None:
            B = B + inputs.extra_B[g].to(B.dtype)
        delta = functional.linear(rank_values, dt_weight.view(R, E).t().to(u.dtype))
        gap = None if inputs.gap is None else inputs.gap[g]
        gap_delta = None if inputs.gap_delta is None else inputs.gap_delta[g]
        scan = ScanInputs(
            u.gather(1, order), delta, A.view(N, E).t(), B, C, D, None, bias, True, None, gap, gap_delta, False
        )
        total.scatter_add_(1, order, backend.scan(scan).to(total.dtype))
    return total.to(u.dtype)
