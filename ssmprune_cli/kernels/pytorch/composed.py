"""The fused ops as the ops that they are made of: what every backend can do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from ssmprune_cli.kernels.inputs import BlocksInputs, InnerInputs, LinearInputs, RoutedInputs, ScanInputs
from ssmprune_cli.kernels.packing import BlockSizes, unpack_block, unpack_inner, unpack_linear

if TYPE_CHECKING:
    from ssmprune_cli.kernels.backend import Backend


def mamba_inner(backend: Backend, inputs: InnerInputs) -> Tensor:
    return backend.gated_sum(_scans(backend, inputs), inputs.xz[..., inputs.channels :], inputs.scale)


def _scans(backend: Backend, inputs: InnerInputs) -> list[Tensor]:
    """The scan outputs of each direction, (B, L, E)."""
    x = inputs.xz[..., : inputs.channels]  # (B, L, E)
    sizes = BlockSizes(x.shape[2], inputs.d_state, inputs.d_conv, inputs.dt_rank, len(inputs.parameters))
    ys = []
    for g, packed in enumerate(inputs.parameters):
        own, reverse = unpack_inner(packed, sizes), g == 1
        if inputs.context is None or inputs.sources is None:
            u = backend.conv(x, own.conv_weight, own.conv_bias, reverse)
        else:
            u = backend.sparse_conv(x, inputs.context, inputs.sources[g], own.conv_weight, own.conv_bias)
        projected = functional.linear(u, own.x_weight.to(u.dtype))
        rank_values, B, C = projected.split([inputs.dt_rank, inputs.d_state, inputs.d_state], dim=-1)
        delta = functional.linear(rank_values, own.dt_weight.to(u.dtype))
        gap = None if inputs.gap is None else inputs.gap[g]
        gap_delta = None if inputs.gap_delta is None else inputs.gap_delta[g]
        scan = ScanInputs(u, delta, own.A, B, C, own.D, None, own.dt_bias, True, None, gap, gap_delta, reverse)
        ys.append(backend.scan(scan))
    return ys


def mamba_blocks(backend: Backend, inputs: BlocksInputs) -> tuple[Tensor, Tensor, Tensor]:
    sizes, hidden, residual = BlockSizes(*inputs.sizes), inputs.hidden, inputs.residual
    ys: list[Tensor] = []
    for block, packed in enumerate(inputs.parameters):
        norm, in_proj, out_proj, inner = unpack_block(packed, hidden.shape[2], sizes)
        norm, in_proj, out_proj = (each.to(hidden.dtype) for each in (norm, in_proj, out_proj))
        normed, residual = backend.add_rms_norm(hidden, residual, norm, inputs.eps)
        context = None
        if inputs.context is not None:
            context = functional.linear(inputs.context * norm, in_proj[: sizes.d_inner])
        gap_delta = None if inputs.gap_delta is None else inputs.gap_delta[block]
        xz = functional.linear(normed, in_proj)
        lost = (inputs.gap, gap_delta, context, inputs.sources)
        given = InnerInputs(xz, inner, sizes.d_state, sizes.d_conv, sizes.dt_rank, *lost, inputs.scale)
        ys = _scans(backend, given)
        hidden = functional.linear(backend.gated_sum(ys, xz[..., sizes.d_inner :], inputs.scale), out_proj)
    assert residual is not None
    y = torch.stack(ys).sum(dim=0) if inputs.wants_y else hidden.new_empty(*hidden.shape[:2], 0)
    return hidden, residual, y


def linear(inputs: LinearInputs) -> Tensor:
    weight = unpack_linear(inputs.weight, inputs.outputs, inputs.x.shape[-1])
    return functional.linear(inputs.x, weight, inputs.bias)


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
