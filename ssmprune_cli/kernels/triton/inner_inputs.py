"""What the scans of a Mamba block read, in one Triton kernel: convolution, SiLU, x_proj and dt_proj of all directions.

A program takes a tile of tokens of one direction and image. It goes through the channels in chunks: each is convolved,
stored as u, and multiplied at once into the sums of B, C and the low-rank step, which stay in registers in float32. At
the end the step is ready, and the program goes through the channels again and stores the raw step sizes.

dt_proj is here and not in the scan: a scan keeps its states and A in registers, and has no room for R weights of each
channel; here the product runs on the matrix units. Inference only.

Letters as in `ops.blocks`; rows, sources and context as in `sparse_conv`; R' and N' as in `kernels.products`.
"""

# Kernels are compiled by Triton, whose types are not those of Python.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from ssmprune_cli.kernels.triton.scan import read, sigmoid


@triton.jit
def met(x, context, sources, x_l, context_l, t, k, tokens, length, others, e, inside, reverse, WIDTH, HAS_SOURCES):
    """(BLOCK_T, BLOCK_E): the rows that tap `k` of the tokens at `t` meets."""
    if HAS_SOURCES:
        source = tl.load(sources + t * WIDTH + k, mask=t < tokens, other=-1)
        live = ((source >= 0) & (source < length))[:, None] & inside[None, :]
        dropped = ((source >= length) & (source < length + others))[:, None] & inside[None, :]
        # One of the two reads nothing: see sparse_conv.
        row = read(x + source[:, None] * x_l + e[None, :], live)
        return row + read(context + (source - length)[:, None] * context_l + e[None, :], dropped)
    row = t + tl.where(reverse, WIDTH - 1 - k, k - WIDTH + 1)
    return read(x + row[:, None] * x_l + e[None, :], ((row >= 0) & (row < tokens))[:, None] & inside[None, :])


@triton.jit
def row_of(reads, t, length, BLOCK: tl.constexpr):
    """(BLOCK_T,): the row of `reads` that names the token t; -1 where none does."""
    found = tl.zeros_like(t) - 1
    for first in range(0, length, BLOCK):
        row = first + tl.arange(0, BLOCK)
        named = tl.load(reads + row, mask=row < length, other=-1)
        found = tl.maximum(found, tl.max(tl.where(named[None, :] == t[:, None], row[None, :], -1), axis=1))
    return found


@triton.jit
def inner_inputs(
    x,  # (B, L, E), rows x_l apart
    context,  # (B, M, E)
    sources,  # (G, B, T, WIDTH), int64
    reads,  # (B, L), int64: which token each row is
    parameters,  # (G, parameters_g), float32, as `pack_inner` gives them
    products,  # (G, products_g), as `pack_products` gives them
    u,  # out, (G, B, T, E)
    delta,  # out, (G, B, T, E): raw step sizes, without their bias
    both,  # out, (G, B, T, 2N): B and C, float32
    rows,  # out, (B, T), int32: the row of each token; -1 for one that is not read
    x_b,
    x_l,
    context_b,
    context_l,
    parameters_g,
    products_g,
    bias_at,  # where in a direction's parameters the convolution's bias is
    tokens,
    length,
    others,
    channels,
    columns,  # 2N
    WIDTH: tl.constexpr,
    HAS_SOURCES: tl.constexpr,
    HAS_READ: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,  # R'
    BLOCK_C: tl.constexpr,  # N'
):
    batch, direction = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    reverse = direction == 1
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    r, c = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
    exists = t < tokens
    sequence = direction * tl.num_programs(1) + batch
    x += batch * x_b
    context += batch * context_b
    sources += sequence * tokens * WIDTH
    taps = parameters + direction * parameters_g
    step_weight = products + direction * products_g
    both_weight = step_weight + BLOCK_R
    dt_weight = step_weight + channels * (BLOCK_R + BLOCK_C)
    out = (sequence * tokens + t) * channels
    if HAS_READ:
        named = row_of(reads + batch * length, t, length, 64)
        once = t < tl.where(reverse, 0, tokens)
        tl.store(rows + batch * tokens + t, named.to(tl.int32), mask=once)
    rank = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    vectors = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for first in range(0, channels, BLOCK_E):
        e = first + tl.arange(0, BLOCK_E)
        inside = e < channels
        total = tl.zeros((BLOCK_T, BLOCK_E), tl.float32) + read(taps + bias_at + e, inside)[None, :]
        for k in tl.static_range(WIDTH):
            row = met(
                x,
                context,
                sources,
                x_l,
                context_l,
                t,
                k,
                tokens,
                length,
                others,
                e,
                inside,
                reverse,
                WIDTH,
                HAS_SOURCES,
            )
            total += row * read(taps + k * channels + e, inside)[None, :]
        values = tl.where(inside[None, :], total * sigmoid(total), 0.0).to(u.dtype.element_ty)
        tl.store(u + out[:, None] + e[None, :], values, mask=exists[:, None] & inside[None, :])
        weight = tl.load(step_weight + e[:, None] * (BLOCK_R + BLOCK_C) + r[None, :], mask=inside[:, None], other=0.0)
        rank = tl.dot(values, weight, rank, input_precision=PRECISION)
        weight = tl.load(both_weight + e[:, None] * (BLOCK_R + BLOCK_C) + c[None, :], mask=inside[:, None], other=0.0)
        vectors = tl.dot(values, weight, vectors, input_precision=PRECISION)
    at = both + (sequence * tokens + t)[:, None] * columns + c[None, :]
    tl.store(at, vectors, mask=exists[:, None] & (c < columns)[None, :])
    low_rank = rank.to(u.dtype.element_ty)
    for first in range(0, channels, BLOCK_E):
        e = first + tl.arange(0, BLOCK_E)
        inside = e < channels
        weight = tl.load(dt_weight + r[:, None] * channels + e[None, :], mask=inside[None, :], other=0.0)
        raw = tl.dot(low_rank, weight, input_precision=PRECISION)
        mask = exists[:, None] & inside[None, :]
        tl.store(delta + out[:, None] + e[None, :], raw.to(delta.dtype.element_ty), mask=mask)
