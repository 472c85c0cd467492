"""Our ops as a graph of PyTorch's own: for a file that is read where this package is not.

Letters: B batch, L tokens, E channels, N state size; H heads of P channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ssmprune_cli.kernels.inputs import GridConvInputs, Moved, MoveInputs, OrderInputs, ScanInputs, SsdInputs
from ssmprune_cli.kernels.packing import EightBit
from ssmprune_cli.kernels.pytorch import eager, eight_bit_linear, finish, prune, ssd_steps, steps


def _scan(*values: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The op's arguments: those of ScanInputs, and which states it gives. A file always gives the last one.

    `scan_op` is the operator itself: the function `scan` around it would compile what it is given.
    """
    from torch._higher_order_ops.scan import scan_op  # it imports the compiler, which takes seconds

    *given, _, _ = values
    inputs = ScanInputs(*given)
    u, reverse, read = inputs.u, inputs.reverse, inputs.read
    wide = ScanInputs._make(eager.wide(value) if isinstance(value, Tensor) else value for value in inputs)
    sizes, decay = steps(wide)
    along = [each.transpose(0, 1) for each in (decay, sizes * wide.u, wide.B, wide.C)]  # (L, B, .)
    along = [each.flip(0) if reverse else each.contiguous() for each in along]
    start = wide.initial_state
    if start is None:
        start = wide.u.new_zeros(u.shape[0], u.shape[2], wide.A.shape[1])
    last, y = scan_op(_step, [start], along, (wide.A,))  # (L, B, E)
    y = finish((y.flip(0) if reverse else y).transpose(0, 1), wide).to(u.dtype)
    y = y if read is None else y.gather(1, read[..., None].expand(-1, -1, u.shape[2]))
    return y, last, u.new_empty(0)


def _step(state: Tensor, decay: Tensor, drive: Tensor, b: Tensor, c: Tensor, rates: Tensor) -> list[Tensor]:
    """The state (B, E, N) after a token and what is read of it, (B, E); decay, drive (B, E), b, c (B, N)."""
    after = torch.exp(decay[..., None] * rates) * state + drive[..., None] * b[:, None]
    return [after, (after * c[:, None]).sum(dim=-1)]


def _ssd(*values: Any) -> tuple[Tensor, Tensor]:
    """The op's arguments are those of SsdInputs."""
    from torch._higher_order_ops.scan import scan_op

    inputs = SsdInputs(*values)
    wide = SsdInputs._make(eager.wide(value) if isinstance(value, Tensor) else value for value in inputs)
    x, D = wide.x, wide.D
    dt, decay = ssd_steps(wide)
    shared = x.shape[2] // wide.B.shape[2]
    of_heads = [each.repeat_interleave(shared, dim=2) for each in (wide.B, wide.C)]  # (B, L, H, N)
    along = [each.transpose(0, 1).contiguous() for each in (torch.exp(decay * wide.A), dt[..., None] * x, *of_heads)]
    start = wide.initial_state
    if start is None:
        start = x.new_zeros(x.shape[0], *x.shape[2:], wide.B.shape[3])
    last, y = scan_op(_ssd_step, [start], along, ())  # (L, B, H, P)
    y = y.transpose(0, 1)
    return (y if D is None else y + D[:, None] * x).to(inputs.x.dtype), last


def _ssd_step(state: Tensor, factor: Tensor, drive: Tensor, b: Tensor, c: Tensor) -> list[Tensor]:
    """The state (B, H, P, N) after a token and what is read of it; factor (B, H), drive (B, H, P), b, c (B, H, N)."""
    after = factor[..., None, None] * state + drive[..., None] * b[:, :, None]
    return [after, (after * c[:, :, None]).sum(dim=-1)]


def _conv(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
    return eager.conv_silu(x, weight, bias, reverse)


def _grid_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: int, columns: int, positions: Tensor | None, outputs: int
) -> Tensor:
    return eager.grid_conv_silu(GridConvInputs(x, weight, bias, rows, columns, positions, outputs))


def _gated_sum(ys: Sequence[Tensor], z: Tensor, scale: float) -> Tensor:
    return eager.gated_sum(ys, z, scale)


def _order(*values: Any) -> Tensor:
    """The op's arguments are those of OrderInputs."""
    return prune.order_tokens(OrderInputs(*values))


def _move(*values: Any) -> Moved:
    """The op's arguments are those of MoveInputs."""
    return prune.move_tokens(MoveInputs(*values))


def _eight_bit_linear(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return eight_bit_linear(x, EightBit(values, scale), bias)


_OPS = torch.ops.ssmprune
PLAIN_PRUNE: dict[Any, Callable[..., Any]] = {
    _OPS.score_tokens.default: prune.score_tokens,
    _OPS.order_tokens.default: _order,
    _OPS.move_tokens.default: _move,
}
PLAIN: dict[Any, Callable[..., Any]] = {
    _OPS.selective_scan.default: _scan,
    _OPS.ssd_scan.default: _ssd,
    _OPS.causal_conv1d.default: _conv,
    _OPS.sparse_conv1d.default: eager.sparse_conv_silu,
    _OPS.grid_conv2d.default: _grid_conv,
    _OPS.add_rms_norm.default: eager.add_rms_norm,
    _OPS.gated_sum.default: _gated_sum,
    **PLAIN_PRUNE,
    _OPS.eight_bit_linear.default: _eight_bit_linear,
}
