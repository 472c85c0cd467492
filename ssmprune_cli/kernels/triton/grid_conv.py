"""The depthwise convolution over a grid, with SiLU, in Triton, forward and backward.

One program computes a tile of tokens and channels, from tokens where they lie: with tokens missing, a table says which
row of x stands at each place of the grid. In PyTorch the tokens are put into a grid in float32, convolved in another
layout, and taken out again, about 50 bytes of traffic a value in bfloat16 where these kernels have 4 (neighbours come
from the cache).

The backward pass gathers likewise, and adds the gradient of the weight up in a fixed order.
"""

# Kernels are compiled by Triton, whose types are not those of Python.
# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmprune_cli.kernels.inputs import GridConvInputs
from ssmprune_cli.kernels.triton.scan import read, sigmoid

BLOCK_L, BLOCK_E = 16, 64  # tokens and channels of a tile
ENOUGH_PROGRAMS = 2048  # keep a GPU busy; more would only leave more sums to add up


@triton.jit
def at_neighbour(values, table, place, below, right, rows, columns, count, stride, e, inside, DENSE: tl.constexpr):
    """(BLOCK_L, BLOCK_E) float32: `values` of the tokens so many rows below and columns right, or 0."""
    row, column = place // columns + below, place % columns + right
    there = (place >= 0) & (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
    source = row * columns + column
    if not DENSE:
        source = tl.load(table + source, mask=there, other=-1)
    there = there & (source >= 0) & (source < count)
    return read(values + source.to(tl.int64)[:, None] * stride + e[None, :], there[:, None] & inside[None, :])


@triton.jit
def places_of(positions, t, count, DENSE: tl.constexpr):
    """(BLOCK_L,) int32 place of each token; -1 where there is none."""
    if DENSE:
        return tl.where(t < count, t, -1)
    return tl.load(positions + t, mask=t < count, other=-1).to(tl.int32)


@triton.jit
def grid_conv_forward(
    x,
    weight,  # (WIDTH * WIDTH, E): neighbouring threads read neighbouring channels
    bias,
    table,  # (B, rows * columns) int32: the row of x at each place, or -1
    positions,  # (B, inputs) int64
    grad,  # (B, outputs, E), with BACKWARD
    y,  # out, (B, outputs, E): with BACKWARD the gradient of what goes into the SiLU, float32
    x_b,
    x_l,
    rows,
    columns,
    inputs,
    outputs,
    channels,
    WIDTH: tl.constexpr,
    DENSE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    batch = tl.program_id(2).to(tl.int64)
    e, t = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E), tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    inside = e < channels
    table += batch * rows * columns
    place = places_of(positions + batch * inputs, t, outputs, DENSE)
    total = tl.zeros((BLOCK_L, BLOCK_E), tl.float32)
    if HAS_BIAS:
        total += read(bias + e, inside)[None, :]
    for tap in range(WIDTH * WIDTH):
        below, right = tap // WIDTH - WIDTH // 2, tap % WIDTH - WIDTH // 2
        met = at_neighbour(x + batch * x_b, table, place, below, right, rows, columns, inputs, x_l, e, inside, DENSE)
        total += met * read(weight + tap * channels + e, inside)[None, :]
    mask = (t < outputs)[:, None] & inside[None, :]
    at = (batch * outputs + t)[:, None] * channels + e[None, :]
    gate = sigmoid(total)
    result = total * gate
    if BACKWARD:
        result = read(grad + at, mask) * gate * (1.0 + total * (1.0 - gate))
    tl.store(y + at, result.to(y.dtype.element_ty), mask=mask)


@triton.jit
def grid_conv_backward_input(
    inner,  # (B, outputs, E) float32: gradient of what goes into the SiLU
    weight,
    table,
    positions,
    dx,  # out, (B, inputs, E)
    rows,
    columns,
    inputs,
    outputs,
    channels,
    WIDTH: tl.constexpr,
    DENSE: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    batch = tl.program_id(2).to(tl.int64)
    e, t = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E), tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    inside = e < channels
    table += batch * rows * columns
    inner += batch * outputs * channels
    place = places_of(positions + batch * inputs, t, inputs, DENSE)
    total = tl.zeros((BLOCK_L, BLOCK_E), tl.float32)
    for tap in range(WIDTH * WIDTH):
        above, left = tap // WIDTH - WIDTH // 2, tap % WIDTH - WIDTH // 2  # who meets this token with this tap
        met = at_neighbour(inner, table, place, -above, -left, rows, columns, outputs, channels, e, inside, DENSE)
        total += met * read(weight + tap * channels + e, inside)[None, :]
    at = (batch * inputs + t)[:, None] * channels + e[None, :]
    tl.store(dx + at, total.to(dx.dtype.element_ty), mask=(t < inputs)[:, None] & inside[None, :])


@triton.jit
def grid_conv_backward_weight(
    x,
    inner,
    table,
    positions,
    dweight,  # out, (parts, WIDTH * WIDTH + 1, E): of each tap, then of the bias
    x_b,
    x_l,
    rows,
    columns,
    inputs,
    outputs,
    channels,
    tiles,  # of tokens, of all images
    WIDTH: tl.constexpr,
    DENSE: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    tap, part, parts = tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    inside = e < channels
    below, right = tap // WIDTH - WIDTH // 2, tap % WIDTH - WIDTH // 2
    of_image = tl.cdiv(outputs, BLOCK_L)
    total = tl.zeros((BLOCK_L, BLOCK_E), tl.float32)
    for tile in range(part, tiles, parts):
        batch = (tile // of_image).to(tl.int64)
        t = tile % of_image * BLOCK_L + tl.arange(0, BLOCK_L)
        mask = (t < outputs)[:, None] & inside[None, :]
        gradient = read(inner + (batch * outputs + t)[:, None] * channels + e[None, :], mask)
        if tap < WIDTH * WIDTH:
            place = places_of(positions + batch * inputs, t, outputs, DENSE)
            own = table + batch * rows * columns
            gradient *= at_neighbour(
                x + batch * x_b, own, place, below, right, rows, columns, inputs, x_l, e, inside, DENSE
            )
        total += gradient
    at = (part * tl.num_programs(1) + tap).to(tl.int64) * channels
    tl.store(dweight + at + e, tl.sum(total, axis=0), mask=inside)


class GridConv:
    """One call; see `ops.conv.grid_conv2d`."""

    def __init__(self, inputs: GridConvInputs) -> None:
        x, weight, bias, rows, columns, positions, outputs = inputs
        self._x = x = x if x.stride(2) == 1 else x.contiguous()
        self._batch, length, self._channels = x.shape
        self._weight, self._bias = weight, bias
        self._taps = weight.flatten(1).t().contiguous()  # (WIDTH * WIDTH, E)
        self._places = (self._taps, self._taps)  # stand in for what is not there
        if positions is not None:
            table = torch.full((self._batch, rows * columns), -1, dtype=torch.int32, device=x.device)
            index = torch.arange(length, dtype=torch.int32, device=x.device).expand(self._batch, -1)
            self._places = (table.scatter_(1, positions, index), positions.contiguous())
        self._strides = x.stride()[:2]
        self._outputs = outputs
        self._sizes = (rows, columns, length, outputs, self._channels)
        self._flags = {"WIDTH": weight.shape[1], "DENSE": positions is None, "BLOCK_L": BLOCK_L, "BLOCK_E": BLOCK_E}

    def forward(self) -> Tensor:
        return self._before_silu(None, self._x.dtype)

    def _before_silu(self, grad: Tensor | None, dtype: torch.dtype) -> Tensor:
        """y, or with the gradient of y that of what goes into the SiLU."""
        x, bias = self._x, self._bias
        y = torch.empty(self._batch, self._outputs, self._channels, dtype=dtype, device=x.device)
        if y.numel():
            with torch.cuda.device_of(x):
                grid_conv_forward[self._grid(self._outputs)](
                    x,
                    self._taps,
                    self._taps if bias is None else bias.contiguous(),
                    *self._places,
                    x if grad is None else grad.contiguous(),
                    y,
                    *self._strides,
                    *self._sizes,
                    HAS_BIAS=bias is not None,
                    BACKWARD=grad is not None,
                    **self._flags,
                )
        return y

    def backward(self, grad: Tensor) -> tuple[Tensor, ...]:
        """Gradients of x, weight and, if there is one, bias."""
        x, weight, bias = self._x, self._weight, self._bias
        inner = self._before_silu(grad, torch.float32)
        d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        blocks, of_image, _ = self._grid(self._outputs)
        sums, tiles = self._taps.shape[0] + 1, of_image * self._batch
        parts = max(1, min(tiles, ENOUGH_PROGRAMS // (blocks * sums)))
        partial = inner.new_empty(parts, sums, self._channels)
        with torch.cuda.device_of(x):
            if d_x.numel():
                grid_conv_backward_input[self._grid(x.shape[1])](
                    inner, self._taps, *self._places, d_x, *self._sizes, **self._flags
                )
            if self._channels:
                grid_conv_backward_weight[(blocks, sums, parts)](
                    x, inner, *self._places, partial, *self._strides, *self._sizes, tiles, **self._flags
                )
        total = partial.sum(dim=0)
        d_weight = total[:-1].t().unflatten(1, weight.shape[1:]).to(weight.dtype)
        return (d_x, d_weight) if bias is None else (d_x, d_weight, total[-1].to(bias.dtype))

    def _grid(self, tokens: int) -> tuple[int, int, int]:
        return triton.cdiv(self._channels, BLOCK_E), triton.cdiv(tokens, BLOCK_L), self._batch
