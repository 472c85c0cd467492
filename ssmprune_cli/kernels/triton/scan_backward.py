"""The backward pass of the aligned selective scan in Triton; see `triton_scan`."""

# Kernels are compiled by Triton, whose types are not those of Python.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from ssmprune_cli.kernels.triton.scan import LOG2E, read, sigmoid, steps


@triton.jit
def scan_backward(
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
    grad,  # (B, L, E), contiguous
    starts,  # (B, groups, E, N): state before each group
    carries,  # (B, groups, E, N): dL/dstate that the groups after each send back
    saved,  # scratch, (B, segments, E, N): states at the start of every SEGMENT tokens
    recomputed,  # scratch, (B, groups, SEGMENT, E, N): states before each token of the segment at hand
    du,  # out, (B, L, E), as ddelta, dz, dshift
    ddelta,
    dA,  # out, (B, groups, E, N)
    dB,  # out, (B, blocks of channels, L, N), as dC
    dC,
    dD,  # out, (B, groups, E), as dbias, dgap_delta
    dz,
    dbias,
    dshift,
    dgap_delta,
    dinitial,  # out, (B, E, N)
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
    group,  # tokens, a multiple of SEGMENT
    channels,
    state,
    SOFTPLUS: tl.constexpr,
    MODE: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    HAS_CARRIES: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    REVERSE: tl.constexpr,
    STAGES: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    batch, part = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    block, blocks, groups = tl.program_id(0).to(tl.int64), tl.num_programs(0), tl.num_programs(2)
    e, n = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_N)
    inside, states = e < channels, n < state
    both = inside[:, None] & states[None, :]
    tile = e[:, None] * state + n[None, :]
    a = read(A + tile, both) * LOG2E
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
    dB += (batch * blocks + block) * length * state
    dC += (batch * blocks + block) * length * state
    saved += batch * tl.cdiv(length, SEGMENT) * channels * state
    recomputed += (batch * groups + part) * SEGMENT * channels * state
    first = part * group
    count = tl.minimum(group, length - first).to(tl.int32)

    # The state at the start of every segment.
    if HAS_STARTS:
        h = tl.load(starts + (batch * groups + part) * channels * state + tile, mask=both, other=0.0)
    else:
        h = tl.zeros((BLOCK_E, BLOCK_N), tl.float32)
    if HAS_CARRIES:
        carry = tl.load(carries + (batch * groups + part) * channels * state + tile, mask=both, other=0.0)
    else:
        carry = tl.zeros((BLOCK_E, BLOCK_N), tl.float32)
    segments = tl.cdiv(count, SEGMENT)
    for segment in range(0, segments):
        tl.store(saved + (first // SEGMENT + segment) * channels * state + tile, h, mask=both)
        for i in tl.range(segment * SEGMENT, tl.minimum((segment + 1) * SEGMENT, count), num_stages=STAGES):
            row = length - 1 - (first + i) if REVERSE else first + i
            _, step, decay = steps(
                delta, shared_bias, shift, gap, shared_gap, row, delta_l, shift_l, gap_l, e, inside, SOFTPLUS, MODE
            )
            drive = step * read(u + row * u_l + e, inside)
            b = read(B + row * B_l + n, states)
            h = tl.exp2(decay[:, None] * a) * h + drive[:, None] * b[None, :]
    tl.debug_barrier()  # another thread of this program may read what one stored

    sum_A = tl.zeros((BLOCK_E, BLOCK_N), tl.float32)
    sum_D = tl.zeros((BLOCK_E,), tl.float32)
    sum_bias = tl.zeros((BLOCK_E,), tl.float32)
    sum_gap = tl.zeros((BLOCK_E,), tl.float32)
    for back in range(0, segments):
        segment = segments - 1 - back
        low, high = segment * SEGMENT, tl.minimum((segment + 1) * SEGMENT, count)
        h = tl.load(saved + (first // SEGMENT + segment) * channels * state + tile, mask=both, other=0.0)
        for i in tl.range(low, high, num_stages=STAGES):
            tl.store(recomputed + (i - low) * channels * state + tile, h, mask=both)
            row = length - 1 - (first + i) if REVERSE else first + i
            _, step, decay = steps(
                delta, shared_bias, shift, gap, shared_gap, row, delta_l, shift_l, gap_l, e, inside, SOFTPLUS, MODE
            )
            drive = step * read(u + row * u_l + e, inside)
            b = read(B + row * B_l + n, states)
            h = tl.exp2(decay[:, None] * a) * h + drive[:, None] * b[None, :]
        tl.debug_barrier()
        after = h
        for j in tl.range(0, high - low, num_stages=STAGES):
            i = high - 1 - j
            row = length - 1 - (first + i) if REVERSE else first + i
            raw, step, decay = steps(
                delta, shared_bias, shift, gap, shared_gap, row, delta_l, shift_l, gap_l, e, inside, SOFTPLUS, MODE
            )
            token = read(u + row * u_l + e, inside)
            b, c = read(B + row * B_l + n, states), read(C + row * C_l + n, states)
            before = tl.load(recomputed + (i - low) * channels * state + tile, mask=both, other=0.0)
            factor = tl.exp2(decay[:, None] * a)
            drive = step * token
            wide = (batch * length + row) * channels + e
            through = read(grad + wide, inside)  # dL/dy before the gate
            if HAS_Z:
                gate = read(z + row * z_l + e, inside)
                sigma = sigmoid(gate)
                out = tl.sum(after * c[None, :], axis=1)
                if HAS_D:
                    out += skip * token
                d_gate = through * out * sigma * (1.0 + gate * (1.0 - sigma))
                tl.store(dz + wide, d_gate.to(dz.dtype.element_ty), mask=inside)
                through *= gate * sigma
            d_h = through[:, None] * c[None, :] + carry
            carry = factor * d_h
            d_exponent = carry * before
            d_decay = tl.sum(d_exponent * a, axis=1) / LOG2E
            d_drive = tl.sum(d_h * b[None, :], axis=1)
            sum_A += d_exponent * decay[:, None]
            narrow = row * state + n
            tl.store(dB + narrow, tl.sum(d_h * drive[:, None], axis=0), mask=states)
            tl.store(dC + narrow, tl.sum(through[:, None] * after, axis=0), mask=states)
            after = before
            d_token = d_drive * step
            if HAS_D:
                d_token += skip * through
                sum_D += through * token
            tl.store(du + wide, d_token.to(du.dtype.element_ty), mask=inside)
            d_step = d_drive * token + d_decay
            if MODE == 1:
                tl.store(dshift + wide, d_decay.to(dshift.dtype.element_ty), mask=inside)
            if MODE == 2:
                d_step += d_decay * tl.load(gap + row * gap_l).to(tl.float32)
            if MODE == 3:
                sum_gap += d_decay * tl.load(gap + row * gap_l).to(tl.float32)
            if SOFTPLUS:
                d_step *= sigmoid(raw)
            sum_bias += d_step
            tl.store(ddelta + wide, d_step.to(ddelta.dtype.element_ty), mask=inside)
        tl.debug_barrier()  # the next segment writes over what this one read

    place = (batch * groups + part) * channels + e
    tl.store(dA + (batch * groups + part) * channels * state + tile, sum_A, mask=both)
    if HAS_INITIAL:
        starting = tl.where(part == 0, channels, 0)  # the first group alone stores it
        at_start = (e < starting)[:, None] & states[None, :]
        tl.store(dinitial + batch * channels * state + tile, carry, mask=at_start)
    if HAS_D:
        tl.store(dD + place, sum_D, mask=inside)
    if HAS_BIAS:
        tl.store(dbias + place, sum_bias, mask=inside)
    if MODE == 3:
        tl.store(dgap_delta + place, sum_gap, mask=inside)
