"""The convolution that meets listed rows, with SiLU, in Triton, forward and backward; see `triton_conv_launch`.

One program computes a tile of tokens and channels. *Rows* are those of x (B, L, E) followed by those of context
(B, M, E); they stay where they are, and a row that does not exist counts as 0.

The backward pass gathers: each row adds up what the tokens that met it send back. Which those are is a list for each
row and tap, since any number of tokens may meet a row with the same tap. A convolution over the merged order of live
and dropped tokens has at most one in each list, and then the sums have one order and the gradients no random bits.
"""

# Kernels are compiled by Triton, whose types are not those of Python.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from ssmprune_cli.kernels.triton.conv import tile
from ssmprune_cli.kernels.triton.scan import read, sigmoid

UNROLLED = tl.constexpr(4)  # taps whose rows are fetched at the same time: each waits for the row's number first


@triton.jit
def met(x, context, sources, x_l, context_l, t, k, length, others, e, inside, WIDTH):
    """(BLOCK_L, BLOCK_E): the rows that tap `k` of the tokens at `t` meets."""
    source = tl.load(sources + t * WIDTH + k, mask=t < length, other=-1)
    live = ((source >= 0) & (source < length))[:, None] & inside[None, :]
    dropped = ((source >= length) & (source < length + others))[:, None] & inside[None, :]
    # One of the two reads nothing. To read once from a chosen pointer would lose what Triton knows of its alignment.
    row = read(x + source[:, None] * x_l + e[None, :], live)
    return row + read(context + (source - length)[:, None] * context_l + e[None, :], dropped)


@triton.jit
def before_silu(x, context, sources, weight, bias, x_l, context_l, t, length, others, channels, e, inside, WIDTH):
    total = tl.zeros((t.shape[0], e.shape[0]), tl.float32) + read(bias + e, inside)[None, :]
    for k in tl.range(WIDTH, loop_unroll_factor=min(WIDTH, UNROLLED)):
        row = met(x, context, sources, x_l, context_l, t, k, length, others, e, inside, WIDTH)
        total += row * read(weight + k * channels + e, inside)[None, :]
    return total


@triton.jit
def sparse_conv_forward(
    x,
    context,
    sources,  # (B, L, WIDTH), int64
    weight,  # (WIDTH, E): neighbouring threads read neighbouring channels
    bias,
    y,  # out, (B, L, E)
    x_b,
    x_l,
    context_b,
    context_l,
    length,
    others,
    channels,
    WIDTH: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    batch, e, inside, t = tile(channels, BLOCK_L, BLOCK_L, BLOCK_E)
    x += batch * x_b
    context += batch * context_b
    sources += batch * length * WIDTH
    total = before_silu(
        x, context, sources, weight, bias, x_l, context_l, t, length, others, channels, e, inside, WIDTH
    )
    at = y + (batch * length + t)[:, None] * channels + e[None, :]
    mask = (t < length)[:, None] & inside[None, :]
    tl.store(at, (total * sigmoid(total)).to(y.dtype.element_ty), mask=mask)


@triton.jit
def sparse_conv_backward(
    x,
    context,
    sources,
    weight,
    bias,
    grad,  # (B, L, E), contiguous
    inner,  # out, (B, L, E): dL/d(before SiLU)
    dweight,  # out, (B, blocks of tokens, WIDTH, E): sums over a block of tokens
    dbias,  # out, (B, blocks of tokens, E)
    x_b,
    x_l,
    context_b,
    context_l,
    length,
    others,
    channels,
    WIDTH: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    batch, e, inside, t = tile(channels, BLOCK_L, BLOCK_L, BLOCK_E)
    x += batch * x_b
    context += batch * context_b
    sources += batch * length * WIDTH
    total = before_silu(
        x, context, sources, weight, bias, x_l, context_l, t, length, others, channels, e, inside, WIDTH
    )
    sigma = sigmoid(total)
    at = (batch * length + t)[:, None] * channels + e[None, :]
    mask = (t < length)[:, None] & inside[None, :]
    d_total = read(grad + at, mask) * sigma * (1.0 + total * (1.0 - sigma))
    tl.store(inner + at, d_total, mask=mask)
    block = batch * tl.num_programs(1) + tl.program_id(1)
    tl.store(dbias + block * channels + e, tl.sum(d_total, axis=0), mask=inside)
    for k in tl.range(WIDTH, loop_unroll_factor=min(WIDTH, UNROLLED)):
        row = met(x, context, sources, x_l, context_l, t, k, length, others, e, inside, WIDTH)
        tl.store(dweight + (block * WIDTH + k) * channels + e, tl.sum(d_total * row, axis=0), mask=inside)


@triton.jit
def list_meetings(
    sources,
    first,  # in -1, out (B, L + M, WIDTH): a token whose tap k meets the row; -1 for none
    following,  # out, (B, L, WIDTH): another token whose tap k meets the same row as this one's; -1 for none
    entries,  # B * L * WIDTH
    length,
    others,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(sources + entry, mask=entry < entries, other=-1)
    token = entry // WIDTH
    batch = token // length
    exists = (source >= 0) & (source < length + others)
    at = (batch * (length + others) + source) * WIDTH + entry % WIDTH
    before = tl.atomic_xchg(first + at, (token - batch * length).to(tl.int32), mask=exists, sem="relaxed")
    tl.store(following + entry, before, mask=exists)


@triton.jit
def received(inner, weight, token, k, channels, e, inside, WIDTH):
    """(BLOCK_L, BLOCK_E): what the tokens `token` send back through tap `k`; zeros for -1."""
    mask = (token >= 0)[:, None] & inside[None, :]
    d_total = read(inner + token.to(tl.int64)[:, None] * channels + e[None, :], mask)
    return d_total * read(weight + k * channels + e, inside)[None, :]


@triton.jit
def sparse_conv_backward_rows(
    inner,
    weight,
    first,
    following,
    dx,  # out, (B, L, E)
    dcontext,  # out, (B, M, E)
    length,
    others,
    channels,
    WIDTH: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    rows = length + others
    batch, e, inside, row = tile(channels, BLOCK_L, BLOCK_L, BLOCK_E)
    inner += batch * length * channels
    first += batch * rows * WIDTH
    following += batch * length * WIDTH
    total = tl.zeros((BLOCK_L, BLOCK_E), tl.float32)
    more = tl.full((BLOCK_L,), -1, tl.int32)
    for k in tl.range(WIDTH, loop_unroll_factor=min(WIDTH, UNROLLED)):
        token = tl.load(first + row * WIDTH + k, mask=row < rows, other=-1)
        total += received(inner, weight, token, k, channels, e, inside, WIDTH)
        more = tl.maximum(more, tl.load(following + token * WIDTH + k, mask=token >= 0, other=-1))
    if tl.max(more, axis=0) >= 0:  # lists of several tokens: not in a convolution over a merged order
        for k in range(WIDTH):
            token = tl.load(first + row * WIDTH + k, mask=row < rows, other=-1)
            token = tl.load(following + token * WIDTH + k, mask=token >= 0, other=-1)
            while tl.max(token, axis=0) >= 0:
                total += received(inner, weight, token, k, channels, e, inside, WIDTH)
                token = tl.load(following + token * WIDTH + k, mask=token >= 0, other=-1)
    total = total.to(dx.dtype.element_ty)
    at = (batch * length + row)[:, None] * channels + e[None, :]
    tl.store(dx + at, total, mask=(row < length)[:, None] & inside[None, :])
    at = (batch * others + row - length)[:, None] * channels + e[None, :]
    tl.store(dcontext + at, total, mask=((row >= length) & (row < rows))[:, None] & inside[None, :])
