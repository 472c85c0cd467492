"""The public ops `add_rms_norm` and `gated_sum`: what surrounds the scans, each in one pass over memory."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ssmprune_cli.errors import KernelError
from ssmprune_cli.kernels.choice import pick
from ssmprune_cli.kernels.ops.library import check, define, three


def add_rms_norm(hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add the last output to the residual stream, and normalise: hidden, residual (B, L, d), weight (d,).

    Returns (normed, stream): stream = hidden + residual, in float32 at least; normed = weight * stream divided by the
    root of its mean square over channels plus eps, in the dtype of weight. Raises KernelError for what does not fit.
    """
    normed, stream = torch.ops.ssmprune.add_rms_norm(hidden, residual, weight, eps)
    return normed, stream


def gated_sum(ys: Sequence[Tensor], z: Tensor, scale: float = 1.0) -> Tensor:
    """(sum of ys) * silu(z) * scale: what follows the scans of all directions; each (B, L, E)."""
    if len(ys) > 1 and z.dtype.itemsize >= 4 and torch.is_grad_enabled() and any(y.requires_grad for y in ys):
        # The backward pass then finds one tensor kept, not all of them. Half precision would round the sum.
        ys = [functools.reduce(torch.add, ys)]
    result: Tensor = torch.ops.ssmprune.gated_sum(list(ys), z, scale)
    return result


def _check_norm(hidden: Tensor, residual: Tensor | None, weight: Tensor) -> None:
    size = three(hidden, "hidden")
    check(hidden, {}, {"weight": (weight, size[2:])})
    stream_dtype = torch.promote_types(hidden.dtype, torch.float32)
    if residual is not None and (residual.shape != size or residual.dtype != stream_dtype):
        raise KernelError(f"residual must be {stream_dtype} of shape {size}")


def _norm(hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    _check_norm(hidden, residual, weight)
    return pick(hidden, 1).add_rms_norm(hidden, residual, weight, eps)


def _norm_fake(hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    _check_norm(hidden, residual, weight)
    stream = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.new_empty(hidden.shape, dtype=weight.dtype), hidden.new_empty(hidden.shape, dtype=stream)


def _norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, residual, weight, ctx.eps = inputs
    ctx.hidden_dtype, ctx.has_residual = hidden.dtype, residual is not None
    ctx.save_for_backward(output[1], weight)


def _norm_backward_op(d_normed: Tensor, d_stream: Tensor, stream: Tensor, weight: Tensor, eps: float) -> list[Tensor]:
    size = three(stream, "stream")
    check(d_normed, {"d_normed": (d_normed, size), "weight": (weight, size[2:])}, {})
    check(stream, {"d_stream": (d_stream, size)}, {})
    return list(pick(d_normed, 1).add_rms_norm_backward(d_normed, d_stream, stream, weight, eps))


def _norm_backward_fake(d_normed: Tensor, d_stream: Tensor, stream: Tensor, weight: Tensor, eps: float) -> list[Tensor]:
    return [stream.new_empty(stream.shape), weight.new_empty(weight.shape)]


def _norm_backward(ctx: Any, d_normed: Tensor, d_stream: Tensor) -> tuple[Tensor | None, ...]:
    d_sum, d_weight = torch.ops.ssmprune.add_rms_norm_backward(d_normed, d_stream, *ctx.saved_tensors, ctx.eps)
    return d_sum.to(ctx.hidden_dtype), d_sum if ctx.has_residual else None, d_weight, None


def _check_gate(ys: Sequence[Tensor], z: Tensor, **more: Tensor) -> None:
    size = three(z, "z")
    if not ys:
        raise KernelError("ys is empty: there is nothing to sum")
    check(z, {f"ys[{number}]": (y, size) for number, y in enumerate(ys)}, {})
    check(z, {name: (value, size) for name, value in more.items()}, {})


def _gate(ys: Sequence[Tensor], z: Tensor, scale: float) -> Tensor:
    _check_gate(ys, z)
    return pick(z, 1).gated_sum(ys, z, scale)


def _gate_fake(ys: Sequence[Tensor], z: Tensor, scale: float) -> Tensor:
    _check_gate(ys, z)
    return z.new_empty(z.shape)


def _gate_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ys, z, ctx.scale = inputs
    ctx.save_for_backward(*ys, z)


def _gate_backward_op(grad: Tensor, ys: Sequence[Tensor], z: Tensor, scale: float) -> list[Tensor]:
    _check_gate(ys, z, grad=grad)
    return list(pick(z, 1).gated_sum_backward(grad, ys, z, scale))


def _gate_backward_fake(grad: Tensor, ys: Sequence[Tensor], z: Tensor, scale: float) -> list[Tensor]:
    return [z.new_empty(z.shape), z.new_empty(z.shape)]


def _gate_backward(ctx: Any, grad: Tensor) -> tuple[list[Tensor], Tensor, None]:
    *ys, z = ctx.saved_tensors
    d_y, d_z = torch.ops.ssmprune.gated_sum_backward(grad, ys, z, ctx.scale)
    return [d_y] * len(ys), d_z, None


define("add_rms_norm", _norm, _norm_fake, backward=_norm_backward, setup=_norm_setup)
define("add_rms_norm_backward", _norm_backward_op, _norm_backward_fake)
define("gated_sum", _gate, _gate_fake, backward=_gate_backward, setup=_gate_setup)
define("gated_sum_backward", _gate_backward_op, _gate_backward_fake)
