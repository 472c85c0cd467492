"""The public ops `causal_conv1d`, `sparse_conv1d`, `grid_conv2d`: depthwise convolutions with SiLU. Glossary: op.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ssmprune_cli.errors import KernelError
from ssmprune_cli.kernels.choice import pick
from ssmprune_cli.kernels.inputs import GridConvInputs
from ssmprune_cli.kernels.ops.library import Expected, check, define, three


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor, *, reverse: bool = False) -> Tensor:
    """silu(depthwise causal convolution) of tokens x (B, L, E) with weight (E, K) and bias (E,), channels-last.

    `reverse` is the mirror image: flip(conv(flip(x))) along L. Raises KernelError for what does not fit.
    """
    channels = three(x, "x")[2]
    check(x, {}, {"weight": (weight, (channels, weight.shape[-1])), "bias": (bias, (channels,))})
    result: Tensor = torch.ops.ssmprune.causal_conv1d(x, weight, bias, reverse)
    return result


def sparse_conv1d(x: Tensor, context: Tensor, sources: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """silu(depthwise convolution) of kept tokens x (B, L, E) that also meets dropped ones, context (B, M, E).

    sources  (B, L, K) int64: the row of x followed by context that tap k of each token meets; -1 for none
    weight   (E, K); bias (E,)

    Returns (B, L, E). Raises KernelError for what does not fit.
    """
    batch, length, channels = three(x, "x")
    width = weight.shape[-1]
    check(
        x,
        {"context": (context, (batch, context.shape[1], channels))},
        {"weight": (weight, (channels, width)), "bias": (bias, (channels,))},
    )
    if sources.shape != (batch, length, width) or sources.dtype != torch.int64:
        raise KernelError(f"sources must be int64 of shape {(batch, length, width)}")
    result: Tensor = torch.ops.ssmprune.sparse_conv1d(x, context, sources, weight, bias)
    return result


def grid_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: tuple[int, int],
    positions: Tensor | None = None,
    outputs: int | None = None,
) -> Tensor:
    """silu(depthwise convolution) of tokens x (B, L, E), each at its place on `grid` (rows, columns); others are 0.

    weight     (E, K, K) with K odd; zero padding, so that the grid keeps its size
    bias       (E,) or None
    positions  (B, L) int64 raster index of each token; None when x is the whole grid
    outputs    compute so many of the tokens, from the first on: the others are only neighbours; None is all of them

    Returns (B, outputs, E), the values at the tokens' own places. Raises KernelError for what does not fit.
    """
    batch, length, channels = three(x, "x")
    rows, columns = grid
    width = weight.shape[-1]
    if positions is None and length != rows * columns:
        raise KernelError(f"{length} tokens without positions do not fill a grid of {rows} x {columns}")
    if width % 2 == 0:
        raise KernelError(f"the width of a grid convolution must be odd, not {width}")
    if positions is not None and (positions.shape != (batch, length) or positions.dtype != torch.int64):
        raise KernelError(f"positions must be int64 of shape {(batch, length)}")
    if outputs is not None and not 0 <= outputs <= length:
        raise KernelError(f"there are no {outputs} outputs among {length} tokens")
    parameters: Expected = {"weight": (weight, (channels, width, width))}
    if bias is not None:
        parameters["bias"] = (bias, (channels,))
    check(x, {}, parameters)
    count = length if outputs is None else outputs
    result: Tensor = torch.ops.ssmprune.grid_conv2d(x, weight, bias, rows, columns, positions, count)
    return result


def conv_flops(batch: int, length: int, channels: int, taps: int) -> int:
    """Multiply-adds of a depthwise convolution; taps that meet padding or a missing token count too."""
    return batch * length * channels * taps


def _conv(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
    return pick(x, weight.shape[1]).conv(x, weight, bias, reverse)


def _conv_backward_op(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> list[Tensor]:
    found = pick(x, weight.shape[1]).conv_backward(grad, x, weight, bias, reverse)
    return [gradient.contiguous() for gradient in found]


def _conv_backward_fake(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in (x, weight, bias)]


def _conv_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _conv_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    found = torch.ops.ssmprune.causal_conv1d_backward(grad.contiguous(), *ctx.saved_tensors, ctx.reverse)
    return (*found, None)


def _sparse_conv(x: Tensor, context: Tensor, sources: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return pick(x, weight.shape[1]).sparse_conv(x, context, sources, weight, bias)


def _sparse_conv_backward_op(
    grad: Tensor, x: Tensor, context: Tensor, sources: Tensor, weight: Tensor, bias: Tensor
) -> list[Tensor]:
    found = pick(x, weight.shape[1]).sparse_conv_backward(grad, x, context, sources, weight, bias)
    return [gradient.contiguous() for gradient in found]


def _sparse_conv_backward_fake(
    grad: Tensor, x: Tensor, context: Tensor, sources: Tensor, weight: Tensor, bias: Tensor
) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in (x, context, weight, bias)]


def _sparse_conv_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _sparse_conv_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    found = torch.ops.ssmprune.sparse_conv1d_backward(grad.contiguous(), *ctx.saved_tensors)
    return found[0], found[1], None, found[2], found[3]


def _grid_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: int, columns: int, positions: Tensor | None, outputs: int
) -> Tensor:
    inputs = GridConvInputs(x, weight, bias, rows, columns, positions, outputs)
    return pick(x, weight.shape[1] ** 2).grid_conv(inputs)


def _grid_conv_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: int, columns: int, positions: Tensor | None, outputs: int
) -> Tensor:
    return x.new_empty(x.shape[0], outputs, x.shape[2])


def _grid_conv_backward_op(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: int,
    columns: int,
    positions: Tensor | None,
    outputs: int,
) -> list[Tensor]:
    inputs = GridConvInputs(x, weight, bias, rows, columns, positions, outputs)
    found = pick(x, weight.shape[1] ** 2).grid_conv_backward(grad, inputs)
    return [gradient.contiguous() for gradient in found]


def _grid_conv_backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *others: Any
) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in (x, weight, bias) if tensor is not None]


def _grid_conv_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, *ctx.grid, positions, ctx.outputs = inputs
    ctx.save_for_backward(x, weight, bias, positions)


def _grid_conv_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, positions = ctx.saved_tensors
    given = (x, weight, bias, *ctx.grid, positions, ctx.outputs)
    found = torch.ops.ssmprune.grid_conv2d_backward(grad.contiguous(), *given)
    return found[0], found[1], None if bias is None else found[2], None, None, None, None


def _like(x: Tensor, *others: Any) -> Tensor:
    return x.new_empty(x.shape)


define("causal_conv1d", _conv, _like, backward=_conv_backward, setup=_conv_setup)
define("causal_conv1d_backward", _conv_backward_op, _conv_backward_fake)
define("sparse_conv1d", _sparse_conv, _like, backward=_sparse_conv_backward, setup=_sparse_conv_setup)
define("sparse_conv1d_backward", _sparse_conv_backward_op, _sparse_conv_backward_fake)
define("grid_conv2d", _grid_conv, _grid_conv_fake, backward=_grid_conv_backward, setup=_grid_conv_setup)
define("grid_conv2d_backward", _grid_conv_backward_op, _grid_conv_backward_fake)


# torch's counter counts a multiply-add as two floating-point operations.
@register_flop_formula(torch.ops.ssmprune.causal_conv1d)
def _(x: Any, weight: Any, *others: Any, **kwargs: Any) -> int:
    batch, length, channels = x
    return 2 * conv_flops(batch, length, channels, weight[1])


@register_flop_formula(torch.ops.ssmprune.sparse_conv1d)
def _(x: Any, context: Any, sources: Any, weight: Any, *others: Any, **kwargs: Any) -> int:
    batch, length, channels = x
    return 2 * conv_flops(batch, length, channels, weight[1])


@register_flop_formula(torch.ops.ssmprune.grid_conv2d)
def _(x: Any, weight: Any, *others: Any, **kwargs: Any) -> int:
    return 2 * conv_flops(x[0], others[-1], x[2], weight[1] ** 2)
