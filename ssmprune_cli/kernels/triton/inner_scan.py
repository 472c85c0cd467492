"""The aligned scans of all directions of a Mamba block in one Triton kernel: their sum with D, and the gate.

A program has a block of channels of one image, and the states of both directions in registers. It walks the forward
scan from the left and the backward one from the right at once. Whoever comes first to a token leaves its y there, in
`out` itself; whoever comes second reads that back, adds its own, gates and stores. So a token is summed by one program
in one order: no atomics, and the same bits each time. A program reads back only what it wrote itself; a barrier stands
between the halves, since the layout of a load may put a value into another thread than the one that stored it.

Places within a sequence are in 32 bits: see `inner_launch.refused`. Letters as in `ops.blocks`. MODE as in `scan`:
0 nothing, 2 `gap` steps of the token's own size, 3 of `gap_delta`. Inference only; without groups of tokens, for which
see `TritonBackend.mamba_inner`.
"""

# Kernels are compiled by Triton, whose types are not those of Python.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from ssmprune_cli.kernels.triton.scan import LOG2E, read, sigmoid, softplus


@triton.jit
def direction_of(
    u, delta, both, parameters, gap, gap_delta, size, mass, tokens, channels, state, rates_at, e, n, inside, direction,
    MODE, HAS_SIZE,
):  # fmt: skip
    """What the steps of one direction read: its own part of each tensor, and A (N, E), bias, D and gap_delta (E,)."""
    batch = tl.program_id(1).to(tl.int64)
    at = (direction * tl.num_programs(1) + batch) * tokens
    a = read(parameters + rates_at + n[:, None] * channels + e[None, :], (n < state)[:, None] & inside[None, :]) * LOG2E
    vectors = parameters + rates_at + (state + 1) * channels + e  # behind A and the convolution's bias
    bias, skip = read(vectors, inside), read(vectors + channels, inside)
    left = read(gap_delta + direction * channels + e, inside) if MODE == 3 else bias
    shared = read(mass, True) if HAS_SIZE else 0.0
    inputs = (u + at * channels + e, delta + at * channels + e, both + at * 2 * state + n, gap + at)
    return inputs, (size + batch * tokens, shared), (a, bias, skip, left)


@triton.jit
def advance(h, own, t, channels, state, n, inside, MODE, GAP, HAS_SIZE):
    """The state (N, E) after the token t, and y (E,), of the direction `own`."""
    inputs, sizes, constants = own
    u, delta, both, gap = inputs
    size, mass = sizes
    a, bias, skip, left = constants
    step = softplus(read(delta + t * channels, inside) + bias)
    value = read(u + t * channels, inside)
    b, c = read(both + t * 2 * state, n < state), read(both + t * 2 * state + state, n < state)
    drive, decay = step * value, step
    if HAS_SIZE:
        growth = mass * (tl.load(size + t).to(tl.float32) - 1.0)
        drive *= 1.0 + growth
    if MODE != 0:
        count = tl.load(gap + t).to(tl.float32) if GAP else growth
        decay = step + count * (step if MODE == 2 else left)
    h = tl.exp2(decay[None, :] * a) * h + drive[None, :] * b[:, None]
    return h, tl.sum(h * c[:, None], axis=0) + skip * value


@triton.jit
def place(outputs, t, inside, HAS_READ):
    """Where `out` and z have the token t, and which channels of it there are."""
    out, z, rows, channels, z_l, e, _ = outputs
    row = t
    if HAS_READ:
        row = tl.load(rows + t)
        inside = e < tl.where(row >= 0, channels, 0)
    return out + row * channels + e, z + row * z_l + e, inside


@triton.jit
def leave(y, outputs, t, inside, HAS_READ):
    """Store the first direction's y of the token t for the second."""
    at, _, mask = place(outputs, t, inside, HAS_READ)
    tl.store(at, y.to(at.dtype.element_ty), mask=mask)


@triton.jit
def finish(y, outputs, t, inside, HAS_READ, ADD):
    """Gate the sum of all directions of the token t, to which `ADD` adds what is there, and store it."""
    at, z, mask = place(outputs, t, inside, HAS_READ)
    if ADD:
        y += read(at, mask)
    gate = read(z, mask)
    tl.store(at, (y * gate * sigmoid(gate) * outputs[6]).to(at.dtype.element_ty), mask=mask)


@triton.jit
def inner_scan(
    u,  # (G, B, T, E)
    delta,  # (G, B, T, E), raw
    both,  # (G, B, T, 2N): B and C
    z,  # (B, L, E), rows z_l apart
    parameters,  # (G, parameters_g), float32, as `pack_inner` gives them
    gap,  # (G, B, T)
    gap_delta,  # (G, E)
    size,  # (B, T)
    mass,  # ()
    rows,  # (B, T), int32: the row of each token; -1 for one that is not read
    out,  # out, (B, L, E)
    z_b,
    z_l,
    parameters_g,
    rates_at,  # where in a direction's parameters A is
    tokens,
    length,
    channels,
    state,
    scale,
    MODE: tl.constexpr,
    GAP: tl.constexpr,  # whether there is `gap`; if not, sizes are what a decay grows by
    HAS_SIZE: tl.constexpr,
    HAS_READ: tl.constexpr,
    TWO: tl.constexpr,  # directions
    STAGES: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    e, n = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_N)
    inside = e < channels
    outputs = (out + batch * length * channels, z + batch * z_b, rows + batch * tokens, channels, z_l, e, scale)
    left = direction_of(
        u, delta, both, parameters, gap, gap_delta, size, mass, tokens, channels, state, rates_at, e, n, inside, 0,
        MODE, HAS_SIZE,
    )  # fmt: skip
    h = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    if TWO:
        right = direction_of(
            u, delta, both, parameters + parameters_g, gap, gap_delta, size, mass, tokens, channels, state, rates_at, e,
            n, inside, 1, MODE, HAS_SIZE,
        )  # fmt: skip
        g = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
        half = tokens // 2
        for t in tl.range(0, half, num_stages=STAGES):
            h, y = advance(h, left, t, channels, state, n, inside, MODE, GAP, HAS_SIZE)
            leave(y, outputs, t, inside, HAS_READ)
            g, y = advance(g, right, tokens - 1 - t, channels, state, n, inside, MODE, GAP, HAS_SIZE)
            leave(y, outputs, tokens - 1 - t, inside, HAS_READ)
        for t in range(half, tokens - half):  # both meet at the token in the middle, if there is one
            h, y = advance(h, left, t, channels, state, n, inside, MODE, GAP, HAS_SIZE)
            g, y_right = advance(g, right, t, channels, state, n, inside, MODE, GAP, HAS_SIZE)
            finish(y + y_right, outputs, t, inside, HAS_READ, False)
        tl.debug_barrier()
        for t in tl.range(tokens - half, tokens, num_stages=STAGES):
            h, y = advance(h, left, t, channels, state, n, inside, MODE, GAP, HAS_SIZE)
            finish(y, outputs, t, inside, HAS_READ, True)
            g, y = advance(g, right, tokens - 1 - t, channels, state, n, inside, MODE, GAP, HAS_SIZE)
            finish(y, outputs, tokens - 1 - t, inside, HAS_READ, True)
    else:
        for t in tl.range(0, tokens, num_stages=STAGES):
            h, y = advance(h, left, t, channels, state, n, inside, MODE, GAP, HAS_SIZE)
            finish(y, outputs, t, inside, HAS_READ, False)
