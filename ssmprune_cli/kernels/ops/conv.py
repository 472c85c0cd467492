"""The public ops `causal_conv1d`, `sparse_conv1d`, `grid_conv2d`: depthwise convolutions with SiLU. Glossary: op.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmprune_cli.errors import KernelError
from ssmprune_cli.kernels.choice import pick
from ssmprune_cli.kernels.inputs import GridConvInputs
from ssmprune_cli.kernels.ops.library import Expected, check, counted, define, three


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor, *, reverse: bool = False) -> Tensor:
    """silu(depthwise causal convolution) of tokens x (B, L, E) with weight (E, K) and bias (E,), channels-last.

    `reverse` is the mirror image: flip(conv(flip(x))) along L. Raises KernelError for what does not fit.
    """
    result: Tensor = torch.ops.ssmprune.causal_conv1d(x, weight, bias, reverse)
    return result


def sparse_conv1d(x: Tensor, context: Tensor, sources: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """silu(depthwise convolution) of kept tokens x (B, L, E) that also meets dropped ones, context (B, M, E).

    sources  (B, L, K) int64: the row of x followed by context that tap k of each token meets; -1 for none
    weight   (E, K); bias (E,)

    Returns (B, L, E). Raises KernelError for what does not fit.
    """
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
    count = x.shape[1] if outputs is None else outputs
    result: Tensor = torch.ops.ssmprune.grid_conv2d(x, weight, bias, *grid, positions, count)
    return result


def _check_conv(x: Tensor, weight: Tensor, bias: Tensor, **outputs: Tensor) -> tuple[int, int, int]:
    """Returns the size of x, which `outputs` have too."""
    size = three(x, "x")
    channels = size[2]
    check(x, {}, {"weight": (weight, (channels, weight.shape[-1])), "bias": (bias, (channels,))})
    check(x, {name: (value, size) for name, value in outputs.items()}, {})
    return size


def _check_sparse(x: Tensor, context: Tensor, sources: Tensor, weight: Tensor, bias: Tensor, **outputs: Tensor) -> None:
    batch, length, channels = _check_conv(x, weight, bias, **outputs)
    check(x, {"context": (context, (batch, three(context, "context")[1], channels))}, {})
    width = weight.shape[1]
    if sources.shape != (batch, length, width) or sources.dtype != torch.int64 or sources.device != x.device:
        raise KernelError(f"sources must be int64 of shape {(batch, length, width)}")


def _check_grid(inputs: GridConvInputs) -> None:
    x, weight, bias, rows, columns, positions, outputs = inputs
    batch, length, channels = three(x, "x")
    width = weight.shape[-1]
    if positions is None and length != rows * columns:
        raise KernelError(f"{length} tokens without positions do not fill a grid of {rows} x {columns}")
    if width % 2 == 0:
        raise KernelError(f"the width of a grid convolution must be odd, not {width}")
    if positions is not None and (positions.shape != (batch, length) or positions.dtype != torch.int64):
        raise KernelError(f"positions must be int64 of shape {(batch, length)}")
    if not 0 <= outputs <= length:
        raise KernelError(f"there are no {outputs} outputs among {length} tokens")
    parameters: Expected = {"weight": (weight, (channels, width, width))}
    if bias is not None:
        parameters["bias"] = (bias, (channels,))
    check(x, {}, parameters)


def conv_flops(batch: int, length: int, channels: int, taps: int) -> int:
    """Multiply-adds of a depthwise convolution; taps that meet padding or a missing token count too."""
    return batch * length * channels * taps


def _conv(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
    _check_conv(x, weight, bias)
    return pick(x, weight.shape[1]).conv(x, weight, bias, reverse)


def _conv_fake(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
    return x.new_empty(_check_conv(x, weight, bias))


def _conv_backward_op(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> list[Tensor]:
    _check_conv(x, weight, bias, grad=grad)
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
    _check_sparse(x, context, sources, weight, bias)
    return pick(x, weight.shape[1]).sparse_conv(x, context, sources, weight, bias)


def _sparse_conv_fake(x: Tensor, context: Tensor, sources: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    _check_sparse(x, context, sources, weight, bias)
    return x.new_empty(x.shape)


def _sparse_conv_backward_op(
    grad: Tensor, x: Tensor, context: Tensor, sources: Tensor, weight: Tensor, bias: Tensor
) -> list[Tensor]:
    _check_sparse(x, context, sources, weight, bias, grad=grad)
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
    _check_grid(inputs)
    return pick(x, weight.shape[1] ** 2).grid_conv(inputs)


def _grid_conv_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: int, columns: int, positions: Tensor | None, outputs: int
) -> Tensor:
    _check_grid(GridConvInputs(x, weight, bias, rows, columns, positions, outputs))
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
    _check_grid(inputs)
    check(x, {"grad": (grad, (x.shape[0], outputs, x.shape[2]))}, {})
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


define("causal_conv1d", _conv, _conv_fake, backward=_conv_backward, setup=_conv_setup)
define("causal_conv1d_backward", _conv_backward_op, _conv_backward_fake)
define("sparse_conv1d", _sparse_conv, _sparse_conv_fake, backward=_sparse_conv_backward, setup=_sparse_conv_setup)
define("sparse_conv1d_backward", _sparse_conv_backward_op, _sparse_conv_backward_fake)
define("grid_conv2d", _grid_conv, _grid_conv_fake, backward=_grid_conv_backward, setup=_grid_conv_setup)
define("grid_conv2d_backward", _grid_conv_backward_op, _grid_conv_backward_fake)


@counted("causal_conv1d")
def _(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return conv_flops(x[0], x[1], x[2], weight[1])


@counted("sparse_conv1d")
def _(x: Any, context: Any, sources: Any, weight: Any, *_: Any, **__: Any) -> int:
    return conv_flops(x[0], x[1], x[2], weight[1])


@counted("grid_conv2d")
def _(x: Any, weight: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    return conv_flops(out_shape[0], out_shape[1], out_shape[2], weight[1] ** 2)
