"""The aligned selective scan in Triton, forward and backward; `triton_backend` launches these kernels.

One program scans a block of channels of one batch entry, token by token, with the (BLOCK_E, BLOCK_N) states in
registers. A scan with too little work side by side is split along the tokens into groups: `group_ends` scans every
group from a zero state, `chain` turns the ends into the true state at the start of each group, and the groups then run
side by side. That doubles the exponentials, but a state crosses a whole group by one factor, exp(A * total decay time).

Names and layouts as in `op.selective_scan`. Every sum is in float32 and in a fixed order: no atomics.
MODE says what alignment adds to a step: 0 nothing, 1 `shift`, 2 `gap` steps of the token's own size, 3 of `gap_delta`.
"""

# Kernels are compiled by Triton, whose types are not those of Python.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def softplus(x):
    """log(1 + exp(x)), also right where exp(x) is lost beside 1."""
    e = tl.exp(-tl.abs(x))
    w = 1.0 + e
    lost = w == 1.0
    # log(w) is the logarithm of the rounded 1 + e; the quotient takes the rounding back (Goldberg 1991, theorem 4).
    return tl.maximum(x, 0.0) + tl.where(lost, e, tl.log(w) * (e / tl.where(lost, 1.0, w - 1.0)))


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def read(pointer, mask):
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def steps(delta, bias, shift, gap, gap_delta, row, delta_l, shift_l, gap_l, e, inside, SOFTPLUS, MODE):
    """Raw step sizes, step sizes and decay times of one token, (BLOCK_E,) each."""
    raw = read(delta + row * delta_l + e, inside) + bias
    step = softplus(raw) if SOFTPLUS else raw
    decay = step
    if MODE == 1:
        decay = step + read(shift + row * shift_l + e, inside)
    if MODE == 2:
        decay = step + tl.load(gap + row * gap_l).to(tl.float32) * step
    if MODE == 3:
        decay = step + tl.load(gap + row * gap_l).to(tl.float32) * gap_delta
    return raw, step, decay


@triton.jit
def group_ends(
    u,
    delta,
    A,
    B,  # C if ADJOINT
    z,
    bias,
    shift,
    gap,
    gap_delta,
    grad,
    ends,  # out, (B, groups, E, N)
    totals,  # out, (B, groups, E): decay time of the whole group
    u_b,
    u_l,
    delta_b,
    delta_l,
    B_b,
    B_l,
    z_b,
    z_l,
    shift_b,
    shift_l,
    gap_b,
    gap_l,
    length,
    group,
    channels,
    state,
    SOFTPLUS: tl.constexpr,
    MODE: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    REVERSE: tl.constexpr,
    STAGES: tl.constexpr,
    ADJOINT: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """State after each group from a zero state before it; with ADJOINT, dL/dstate before it from zero after it."""
    batch, part = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    e, n = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_N)
    inside, states = e < channels, n < state
    both = inside[:, None] & states[None, :]
    a = read(A + e[:, None] * state + n[None, :], both) * LOG2E
    shared_bias = read(bias + e, inside) if HAS_BIAS else tl.zeros((BLOCK_E,), tl.float32)
    shared_gap = read(gap_delta + e, inside) if MODE == 3 else shared_bias
    delta += batch * delta_b
    B += batch * B_b
    shift += batch * shift_b
    gap += batch * gap_b
    h = tl.zeros((BLOCK_E, BLOCK_N), tl.float32)
    total = tl.zeros((BLOCK_E,), tl.float32)
    first = part * group
    count = tl.minimum(group, length - first).to(tl.int32)
    for i in tl.range(0, count, num_stages=STAGES):
        place = first + (count - 1 - i if ADJOINT else i)
        row = length - 1 - place if REVERSE else place
        _, step, decay = steps(
            delta, shared_bias, shift, gap, shared_gap, row, delta_l, shift_l, gap_l, e, inside, SOFTPLUS, MODE
        )
        vector = read(B + row * B_l + n, states)
        factor = tl.exp2(decay[:, None] * a)
        if ADJOINT:
            through = read(grad + (batch * length + row) * channels + e, inside)
            if HAS_Z:
                gate = read(z + batch * z_b + row * z_l + e, inside)
                through *= gate * sigmoid(gate)
            h = factor * (h + through[:, None] * vector[None, :])
        else:
            drive = step * read(u + batch * u_b + row * u_l + e, inside)
            h = factor * h + drive[:, None] * vector[None, :]
        total += decay
    place = (batch * tl.num_programs(2) + part) * channels
    tl.store(ends + (place + e[:, None]) * state + n[None, :], h, mask=both)
    tl.store(totals + place + e, total, mask=inside)


@triton.jit
def chain(
    A,
    initial,  # (B, E, N): state before the first group (ADJOINT: dL/dstate after the last one)
    ends,  # in: as `group_ends` leaves them; out: the true state before each group (ADJOINT: dL/dstate after it)
    totals,
    groups,
    channels,
    state,
    HAS_INITIAL: tl.constexpr,
    ADJOINT: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    e, n = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_N)
    inside = e < channels
    both = inside[:, None] & (n < state)[None, :]
    a = read(A + e[:, None] * state + n[None, :], both) * LOG2E
    if HAS_INITIAL:
        h = tl.load(initial + (batch * channels + e[:, None]) * state + n[None, :], mask=both, other=0.0)
    else:
        h = tl.zeros((BLOCK_E, BLOCK_N), tl.float32)
    for i in range(0, groups):
        place = (batch * groups + (groups - 1 - i if ADJOINT else i)) * channels
        at = ends + (place + e[:, None]) * state + n[None, :]
        own = tl.load(at, mask=both, other=0.0)
        tl.store(at, h, mask=both)
        h = tl.exp2(tl.load(totals + place + e, mask=inside, other=0.0)[:, None] * a) * h + own


@triton.jit
def scan_forward(
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    bias,
    shift,
    gap,
    gap_delta,
    starts,  # (B, groups, E, N): state before each group
    y,  # out, (B, L, E)
    last,  # out, (B, E, N): state after the last token
    u_b,
    u_l,
    delta_b,
    delta_l,
    B_b,
    B_l,
    C_b,
    C_l,
    z_b,
    z_l,
    shift_b,
    shift_l,
    gap_b,
    gap_l,
    length,
    group,
    channels,
    state,
    SOFTPLUS: tl.constexpr,
    MODE: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    HAS_LAST: tl.constexpr,
    REVERSE: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    batch, part = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    e, n = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_N)
    inside, states = e < channels, n < state
    both = inside[:, None] & states[None, :]
    a = read(A + e[:, None] * state + n[None, :], both) * LOG2E
    shared_bias = read(bias + e, inside) if HAS_BIAS else tl.zeros((BLOCK_E,), tl.float32)
    shared_gap = read(gap_delta + e, inside) if MODE == 3 else shared_bias
    skip = read(D + e, inside) if HAS_D else shared_bias
    u += batch * u_b
    delta += batch * delta_b
    B += batch * B_b
    C += batch * C_b
    z += batch * z_b
    shift += batch * shift_b
    gap += batch * gap_b
    if HAS_STARTS:
        place = (batch * tl.num_programs(2) + part) * channels
        h = tl.load(starts + (place + e[:, None]) * state + n[None, :], mask=both, other=0.0)
    else:
        h = tl.zeros((BLOCK_E, BLOCK_N), tl.float32)
    first = part * group
    count = tl.minimum(group, length - first).to(tl.int32)
    for i in tl.range(0, count, num_stages=STAGES):
        row = length - 1 - (first + i) if REVERSE else first + i
        _, step, decay = steps(
            delta, shared_bias, shift, gap, shared_gap, row, delta_l, shift_l, gap_l, e, inside, SOFTPLUS, MODE
        )
        token = read(u + row * u_l + e, inside)
        b, c = read(B + row * B_l + n, states), read(C + row * C_l + n, states)
        h = tl.exp2(decay[:, None] * a) * h + (step * token)[:, None] * b[None, :]
        out = tl.sum(h * c[None, :], axis=1)
        if HAS_D:
            out += skip * token
        if HAS_Z:
            gate = read(z + row * z_l + e, inside)
            out *= gate * sigmoid(gate)
        tl.store(y + (batch * length + row) * channels + e, out.to(y.dtype.element_ty), mask=inside)
    if HAS_LAST:
        ending = tl.where(part == tl.num_programs(2) - 1, channels, 0)  # the last group alone stores it
        at_end = (e < ending)[:, None] & states[None, :]
        tl.store(last + (batch * channels + e[:, None]) * state + n[None, :], h, mask=at_end)
