"""A prune point in Triton, three kernels: scores, the order of the tokens, and the move that parts them.

`score_forward` is one pass over the scan outputs. `order_forward` is one program an image. Scores become integers of
the same order; the K-th largest one is found bit by bit, each bit by one count over all tokens; of the tokens that
equal it the first ones stay, as in a stable sort; running counts then say where each token goes. `move_forward` copies
rows of hidden and residual, adds them up for dropped ones, and takes the gaps from neighbouring positions.
"""

# Kernels are compiled by Triton, whose types are not those of Python.
# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmprune_cli.kernels.inputs import Moved, MoveInputs, OrderInputs
from ssmprune_cli.kernels.triton.rows import MOST_YS, sum_of
from ssmprune_cli.kernels.triton.scan import read

MOST_TOKENS = 16384  # of an image, which one program holds
KINDS = {"clip": 0, "mean": 1, "l1": 2, "l2": 3}
_TILE = 2048  # values that a program works on at once
_MOST_CHANNELS = 1024  # of a tile; more take several rounds
_TOKENS_PER_WARP = 128
_LARGEST = tl.constexpr(3.4028234663852886e38)
_LOWEST_KEY = tl.constexpr(-(2**31))


@triton.jit
def score_forward(
    y0,
    y1,
    y2,
    y3,
    score,  # out, (rows,)
    rows,
    channels,
    COUNT: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_R, BLOCK_E), tl.float32)
    for start in range(0, channels, BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        mask = (r < rows)[:, None] & (e < channels)[None, :]
        value = sum_of(y0, y1, y2, y3, r[:, None] * channels + e[None, :], mask, COUNT)
        if KIND == 0:
            value = tl.where(value < 0, 0.0, value)  # not a maximum, which may lose a NaN
        if KIND == 2:
            value = tl.abs(value)
        if KIND == 3:
            value = value * value
        total += value
    mean = tl.sum(total, axis=1) / channels
    if KIND == 3:
        mean = tl.sqrt(mean)
    tl.store(score + r, mean, mask=r < rows)


@triton.jit
def order_forward(
    score,
    positions,
    live,
    order,  # out, (B, count), or (B, length) if OTHERS
    score_b,
    score_l,
    positions_b,
    positions_l,
    live_b,
    live_l,
    length,
    count,
    PROTECTED: tl.constexpr,
    HAS_LIVE: tl.constexpr,
    OTHERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, BLOCK)
    inside = t < length
    value = read(score + batch * score_b + t * score_l, inside)
    value = tl.where(value != value, -_LARGEST, value)
    value = tl.minimum(tl.maximum(value, -_LARGEST), _LARGEST)
    position = tl.load(positions + batch * positions_b + t * positions_l, mask=inside, other=-1)
    for number in tl.static_range(len(PROTECTED)):
        value = tl.where(position == PROTECTED[number], float("inf"), value)
    if HAS_LIVE:
        alive = tl.load(live + batch * live_b + t * live_l, mask=inside, other=0)
        value = tl.where(alive != 0, value, float("-inf"))
    value = tl.where(value == 0.0, 0.0, value)  # zeros of both signs are equal
    bits = value.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = tl.where(inside, key, _LOWEST_KEY)  # below every score
    # The largest threshold that `count` keys reach: first its sign, then bit by bit.
    threshold = tl.where(tl.sum((key >= 0).to(tl.int32)) >= count, 0, _LOWEST_KEY)
    for place in range(0, 31):
        higher = threshold + (1 << (30 - place))
        threshold = tl.where(tl.sum((key >= higher).to(tl.int32)) >= count, higher, threshold)
    above = (key > threshold).to(tl.int32)
    equal = ((key == threshold) & inside).to(tl.int32)
    stays = above + equal * (tl.cumsum(equal, axis=0) <= count - tl.sum(above)).to(tl.int32)
    before = tl.cumsum(stays, axis=0) - stays
    if OTHERS:
        place = tl.where(stays > 0, before, count + t - before)
        tl.store(order + batch * length + place, t.to(tl.int64), mask=inside)
    else:
        tl.store(order + batch * count + before, t.to(tl.int64), mask=inside & (stays > 0))


@triton.jit
def move_forward(
    hidden,
    residual,
    positions,
    order,
    older,
    older_positions,
    kept_hidden,  # out, (B, count, channels), as kept_residual
    kept_residual,
    kept_positions,  # out, (B, count)
    gaps,  # out, (2, B, count)
    dropped,  # out, (B, ordered - count + others, channels)
    dropped_positions,  # out
    hidden_b,
    hidden_l,
    residual_b,
    residual_l,
    positions_b,
    positions_l,
    count,
    ordered,  # rows of order
    others,  # rows of older
    channels,
    HAS_RESIDUAL: tl.constexpr,
    HAS_DROPPED: tl.constexpr,
    HAS_OLDER: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    batch, batches = tl.program_id(1).to(tl.int64), tl.num_programs(1).to(tl.int64)
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    order += batch * ordered
    positions += batch * positions_b
    stays, now = r < count, r < ordered
    row = tl.load(order + r, mask=now, other=0)
    position = tl.load(positions + row * positions_l, mask=now, other=0)
    earlier, later = stays & (r > 0), r < count - 1
    before = tl.load(order + r - 1, mask=earlier, other=0)
    after = tl.load(order + r + 1, mask=later, other=0)
    before = tl.load(positions + before * positions_l, mask=earlier, other=0)
    after = tl.load(positions + after * positions_l, mask=later, other=0)
    kept = batch * count + r
    tl.store(kept_positions + kept, position, mask=stays)
    tl.store(gaps + kept, tl.where(earlier, position - before - 1, 0).to(tl.float32), mask=stays)
    tl.store(gaps + batches * count + kept, tl.where(later, after - position - 1, 0).to(tl.float32), mask=stays)
    leaves = (r >= count) & now
    was = (r >= ordered) & (r < ordered + others)
    left = batch * (ordered - count + others) + r - count
    past = batch * others + r - ordered
    if HAS_DROPPED:
        tl.store(dropped_positions + left, position, mask=leaves)
    if HAS_OLDER:
        tl.store(dropped_positions + left, tl.load(older_positions + past, mask=was, other=0), mask=was)
    for start in range(0, channels, BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        inside = (e < channels)[None, :]
        at = batch * hidden_b + row[:, None] * hidden_l + e[None, :]
        value = tl.load(hidden + at, mask=now[:, None] & inside, other=0.0)
        tl.store(kept_hidden + kept[:, None] * channels + e[None, :], value, mask=stays[:, None] & inside)
        stream = value.to(tl.float32)
        if HAS_RESIDUAL:
            at = batch * residual_b + row[:, None] * residual_l + e[None, :]
            value = tl.load(residual + at, mask=now[:, None] & inside, other=0.0)
            tl.store(kept_residual + kept[:, None] * channels + e[None, :], value, mask=stays[:, None] & inside)
            stream += value
        goal = dropped + left[:, None] * channels + e[None, :]
        if HAS_DROPPED:
            tl.store(goal, stream, mask=leaves[:, None] & inside)
        if HAS_OLDER:
            value = tl.load(older + past[:, None] * channels + e[None, :], mask=was[:, None] & inside, other=0.0)
            tl.store(goal, value, mask=was[:, None] & inside)


def score_tokens(ys: Sequence[Tensor], kind: str) -> Tensor:
    """See `ops.prune.score_tokens`; for up to MOST_YS terms."""
    batch, length, channels = ys[0].shape
    score = torch.empty(batch, length, dtype=torch.float32, device=ys[0].device)
    if score.numel() and channels:
        values = [y.contiguous() for y in ys]
        block_r, block_e = _blocks(channels)
        with torch.cuda.device_of(score):
            score_forward[(-(-score.numel() // block_r),)](
                *values,
                *[values[0]] * (MOST_YS - len(values)),
                score,
                score.numel(),
                channels,
                COUNT=len(values),
                KIND=KINDS[kind],
                BLOCK_R=block_r,
                BLOCK_E=block_e,
            )
    return score


def order_tokens(inputs: OrderInputs) -> Tensor:
    """See `ops.prune.order_tokens`; for up to MOST_TOKENS tokens."""
    score, positions, live, protected, count, others = inputs
    batch, length = score.shape
    order = torch.empty(batch, length if others else count, dtype=torch.int64, device=score.device)
    if order.numel():
        mask = positions if live is None else live
        block = triton.next_power_of_2(length)
        with torch.cuda.device_of(order):
            order_forward[(batch,)](
                score,
                positions,
                mask,
                order,
                *score.stride(),
                *positions.stride(),
                *mask.stride(),
                length,
                count,
                PROTECTED=tuple(protected),
                HAS_LIVE=live is not None,
                OTHERS=others,
                BLOCK=block,
                num_warps=min(max(block // _TOKENS_PER_WARP, 1), 16),
            )
    return order


def move_tokens(inputs: MoveInputs) -> Moved:
    """See `ops.prune.move_tokens`; for a residual stream in float32."""
    hidden, residual, positions, order, count, older, older_positions = inputs
    batch, _, channels = hidden.shape
    ordered, others = order.shape[1], 0 if older is None else older.shape[1]
    hidden = hidden if hidden.stride(2) == 1 else hidden.contiguous()
    residual = residual if residual is None or residual.stride(2) == 1 else residual.contiguous()
    moved = Moved(
        hidden.new_empty(batch, count, channels),
        hidden.new_empty(0) if residual is None else residual.new_empty(batch, count, channels),
        torch.empty(batch, count, dtype=torch.int64, device=hidden.device),
        torch.empty(2, batch, count, dtype=torch.float32, device=hidden.device),
        torch.empty(batch, ordered - count + others, channels, dtype=torch.float32, device=hidden.device),
        torch.empty(batch, ordered - count + others, dtype=torch.int64, device=hidden.device),
    )
    rows = ordered + others
    if batch * rows * channels:
        block_r, block_e = _blocks(channels)
        stream = hidden if residual is None else residual  # stands in for what is not there
        with torch.cuda.device_of(hidden):
            move_forward[(-(-rows // block_r), batch)](
                hidden,
                stream,
                positions,
                order.contiguous(),
                stream if older is None else older.contiguous(),
                positions if older_positions is None else older_positions.contiguous(),
                *moved,
                *hidden.stride()[:2],
                *stream.stride()[:2],
                *positions.stride(),
                count,
                ordered,
                others,
                channels,
                HAS_RESIDUAL=residual is not None,
                HAS_DROPPED=ordered > count,
                HAS_OLDER=older is not None,
                BLOCK_R=block_r,
                BLOCK_E=block_e,
            )
    return moved


def _blocks(channels: int) -> tuple[int, int]:
    """Rows and channels of a tile."""
    block_e = min(triton.next_power_of_2(channels), _MOST_CHANNELS)
    return max(1, _TILE // block_e), block_e
