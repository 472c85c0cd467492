"""The causal depthwise convolution with SiLU in Triton, forward and backward; `triton_backend` launches these kernels.

One program computes a tile of tokens and channels, or a few. Token t sees t - WIDTH + 1 ... t, or in reverse
t ... t + WIDTH - 1.
"""

# Kernels are compiled by Triton, whose types are not those of Python.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from ssmprune_cli.kernels.triton.scan import read, sigmoid


@triton.jit
def tile(channels, tokens, BLOCK_L: tl.constexpr, BLOCK_E: tl.constexpr):
    """Batch entry, channels (BLOCK_E,), whether they exist, the first BLOCK_L of this program's `tokens`."""
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    t = tl.program_id(1).to(tl.int64) * tokens + tl.arange(0, BLOCK_L)
    return tl.program_id(2).to(tl.int64), e, e < channels, t


@triton.jit
def shifted(x, x_l, t, offset, length, e, inside):
    """(BLOCK_L, BLOCK_E): the tokens `offset` places after those at `t`, zeros outside of the sequence."""
    row = t + offset
    mask = ((row >= 0) & (row < length))[:, None] & inside[None, :]
    return read(x + row[:, None] * x_l + e[None, :], mask)


@triton.jit
def met(x, x_l, t, k, length, e, inside, REVERSE, WIDTH):
    """(BLOCK_L, BLOCK_E): what tap k of the tokens `t` meets."""
    return shifted(x, x_l, t, WIDTH - 1 - k if REVERSE else k - WIDTH + 1, length, e, inside)


@triton.jit
def before_silu(x, weight, bias, x_l, t, length, channels, e, inside, REVERSE, WIDTH, BLOCK_L, BLOCK_E):
    total = tl.zeros((BLOCK_L, BLOCK_E), tl.float32) + read(bias + e, inside)[None, :]
    for k in range(WIDTH):
        tap = read(weight + k * channels + e, inside)[None, :]
        total += met(x, x_l, t, k, length, e, inside, REVERSE, WIDTH) * tap
    return total


@triton.jit
def conv_forward(
    x,
    weight,  # (WIDTH, E): neighbouring threads read neighbouring channels
    bias,
    y,  # out, (B, L, E)
    x_b,
    x_l,
    length,
    channels,
    REVERSE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    batch, e, inside, t = tile(channels, BLOCK_L, BLOCK_L, BLOCK_E)
    total = before_silu(
        x + batch * x_b, weight, bias, x_l, t, length, channels, e, inside, REVERSE, WIDTH, BLOCK_L, BLOCK_E
    )
    at = y + (batch * length + t)[:, None] * channels + e[None, :]
    mask = (t < length)[:, None] & inside[None, :]
    tl.store(at, (total * sigmoid(total)).to(y.dtype.element_ty), mask=mask)


@triton.jit
def conv_backward(
    x,
    weight,
    bias,
    grad,  # (B, L, E), contiguous
    inner,  # out, (B, L, E): dL/d(before SiLU)
    dweight,  # out, (B, parts, WIDTH, E): sums over the tokens of a program
    dbias,  # out, (B, parts, E)
    x_b,
    x_l,
    length,
    channels,
    REVERSE: tl.constexpr,
    WIDTH: tl.constexpr,  # up to 4
    REPEAT: tl.constexpr,  # tiles of a program
    BLOCK_L: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    batch, e, inside, first = tile(channels, REPEAT * BLOCK_L, BLOCK_L, BLOCK_E)
    x += batch * x_b
    sum_bias = tl.zeros((BLOCK_L, BLOCK_E), tl.float32)
    sum_0, sum_1, sum_2, sum_3 = sum_bias, sum_bias, sum_bias, sum_bias
    for repeat in range(0, REPEAT):
        t = first + repeat * BLOCK_L
        total = before_silu(x, weight, bias, x_l, t, length, channels, e, inside, REVERSE, WIDTH, BLOCK_L, BLOCK_E)
        sigma = sigmoid(total)
        at = (batch * length + t)[:, None] * channels + e[None, :]
        mask = (t < length)[:, None] & inside[None, :]
        d_total = read(grad + at, mask) * sigma * (1.0 + total * (1.0 - sigma))
        tl.store(inner + at, d_total, mask=mask)
        sum_bias += d_total
        sum_0 += d_total * met(x, x_l, t, 0, length, e, inside, REVERSE, WIDTH)
        if WIDTH > 1:
            sum_1 += d_total * met(x, x_l, t, 1, length, e, inside, REVERSE, WIDTH)
        if WIDTH > 2:
            sum_2 += d_total * met(x, x_l, t, 2, length, e, inside, REVERSE, WIDTH)
        if WIDTH > 3:
            sum_3 += d_total * met(x, x_l, t, 3, length, e, inside, REVERSE, WIDTH)
    place = batch * tl.num_programs(1) + tl.program_id(1)
    tl.store(dbias + place * channels + e, tl.sum(sum_bias, axis=0), mask=inside)
    dweight += place * WIDTH * channels + e
    tl.store(dweight, tl.sum(sum_0, axis=0), mask=inside)
    if WIDTH > 1:
        tl.store(dweight + channels, tl.sum(sum_1, axis=0), mask=inside)
    if WIDTH > 2:
        tl.store(dweight + 2 * channels, tl.sum(sum_2, axis=0), mask=inside)
    if WIDTH > 3:
        tl.store(dweight + 3 * channels, tl.sum(sum_3, axis=0), mask=inside)


@triton.jit
def conv_backward_input(
    inner,
    weight,
    dx,  # out, (B, L, E)
    length,
    channels,
    REVERSE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    batch, e, inside, t = tile(channels, BLOCK_L, BLOCK_L, BLOCK_E)
    inner += batch * length * channels
    total = tl.zeros((BLOCK_L, BLOCK_E), tl.float32)
    for k in range(WIDTH):
        offset = k - WIDTH + 1 if REVERSE else WIDTH - 1 - k
        total += (
            shifted(inner, channels, t, offset, length, e, inside) * read(weight + k * channels + e, inside)[None, :]
        )
    mask = (t < length)[:, None] & inside[None, :]
    at = dx + (batch * length + t)[:, None] * channels + e[None, :]
    tl.store(at, total.to(dx.dtype.element_ty), mask=mask)
