"""The public ops of a prune point: `score_tokens`, `order_tokens` and `move_tokens`.

Letters: B batch, L tokens now, K tokens that stay, M tokens dropped before and still in sight, d model width, E
channels of a scan.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ssmprune_cli.errors import KernelError
from ssmprune_cli.kernels.choice import pick
from ssmprune_cli.kernels.inputs import Moved, MoveInputs, OrderInputs
from ssmprune_cli.kernels.ops.library import check, define, three, tracing
from ssmprune_cli.kernels.pytorch import prune

ScoreKind = Literal["clip", "l1", "l2", "mean"]


def score_tokens(ys: Sequence[Tensor], kind: ScoreKind) -> Tensor:
    """Scores (B, L), in float32 at least, of the tokens whose scan outputs sum to y = sum of ys (B, L, E).

    The mean over channels: of max(0, y) ("clip"), of |y| ("l1") or of y ("mean"); or the root of that of y^2 ("l2").
    Source: arXiv 2409.18962, section 4.2 and table 4. Has no gradient. Raises KernelError for what does not fit.
    """
    result: Tensor = torch.ops.ssmprune.score_tokens(list(ys), kind)
    return result


def order_tokens(
    score: Tensor,
    positions: Tensor,
    protected: Sequence[int],
    count: int,
    *,
    live: Tensor | None = None,
    others: bool = False,
) -> Tensor:
    """Rows (B, K) int64 of the `count` tokens that stay, ascending; with `others` (B, L), the rest after them.

    score      (B, L). A NaN counts as the lowest; of equal scores those of lower rows stay
    positions  (B, L) int64
    protected  positions whose tokens stay before all others
    live       (B, L) bool: the other tokens go before all others, even if protected

    Raises KernelError for what does not fit.
    """
    result: Tensor = torch.ops.ssmprune.order_tokens(score, positions, live, list(protected), count, others)
    return result


def rank_tokens(score: Tensor, positions: Tensor, protected: Sequence[int], live: Tensor | None = None) -> Tensor:
    """Rows (B, L) int64 of all tokens, best first: what `order_tokens` takes the first `count` of."""
    return prune.rank_tokens(OrderInputs(score, positions, live, protected, score.shape[1], others=True))


def move_tokens(
    hidden: Tensor,
    residual: Tensor | None,
    positions: Tensor,
    order: Tensor,
    count: int,
    *,
    older: Tensor | None = None,
    older_positions: Tensor | None = None,
) -> Moved:
    """Part tokens hidden, residual (B, L, d) at `positions` (B, L) by `order` (B, K) or (B, L) of `order_tokens`.

    older, older_positions  (B, M, d) in float32 at least, (B, M) int64: tokens dropped before; both or none

    Returns hidden, residual (B, K, d), positions (B, K) and gaps (2, B, K) float32 of the kept tokens (see
    `TokenSequence.both_gaps`), and of the dropped ones, if they are in `order`, followed by the older ones: the stream
    hidden + residual in float32 at least, (B, L - K + M, d), and positions. Raises KernelError for what does not fit.
    """
    found = torch.ops.ssmprune.move_tokens(hidden, residual, positions, order, count, older, older_positions)
    return Moved(*found)


def _score(ys: Sequence[Tensor], kind: str) -> Tensor:
    _check_score(ys, kind)
    return pick(ys[0], 1).score_tokens(ys, kind)


def _score_fake(ys: Sequence[Tensor], kind: str) -> Tensor:
    _check_score(ys, kind)
    return ys[0].new_empty(ys[0].shape[:2], dtype=torch.promote_types(ys[0].dtype, torch.float32))


def _check_score(ys: Sequence[Tensor], kind: str) -> None:
    if not ys:
        raise KernelError("ys is empty: there is nothing to score")
    if kind not in get_args(ScoreKind):
        raise KernelError(f"the kind of score is one of {', '.join(get_args(ScoreKind))}, not {kind!r}")
    size = three(ys[0], "ys[0]")
    check(ys[0], {f"ys[{number}]": (y, size) for number, y in enumerate(ys)}, {})


def _order(
    score: Tensor, positions: Tensor, live: Tensor | None, protected: Sequence[int], count: int, others: bool
) -> Tensor:
    inputs = OrderInputs(score, positions, live, protected, count, others)
    _check_order(inputs)
    return pick(score, 1).order_tokens(inputs)


def _order_fake(
    score: Tensor, positions: Tensor, live: Tensor | None, protected: Sequence[int], count: int, others: bool
) -> Tensor:
    _check_order(OrderInputs(score, positions, live, protected, count, others))
    return positions.new_empty(score.shape[0], score.shape[1] if others else count)


def _check_order(inputs: OrderInputs) -> None:
    if tracing():
        return
    shape = inputs.score.shape
    if len(shape) != 2 or not inputs.score.is_floating_point():
        raise KernelError(f"score must be floating-point numbers (batch, tokens), not {inputs.score.dtype} {shape}")
    _check_index("positions", inputs.positions, tuple(shape), inputs.score)
    if inputs.live is not None and (inputs.live.shape != shape or inputs.live.dtype != torch.bool):
        raise KernelError(f"live must be bool of shape {tuple(shape)}")
    if not 0 <= inputs.kept <= shape[1]:
        raise KernelError(f"{inputs.kept} of {shape[1]} tokens cannot stay")


def _check_index(name: str, index: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    if index.shape != shape or index.dtype != torch.int64 or index.device != like.device:
        raise KernelError(f"{name} must be int64 of shape {shape} on {like.device}, not {index.dtype} {index.shape}")


def _move(
    hidden: Tensor,
    residual: Tensor | None,
    positions: Tensor,
    order: Tensor,
    count: int,
    older: Tensor | None,
    older_positions: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = MoveInputs(hidden, residual, positions, order, count, older, older_positions)
    _check_move(inputs)
    moved = pick(hidden, 1).move_tokens(inputs)
    return (*moved,)


def _check_move(inputs: MoveInputs) -> None:
    if tracing():
        return
    hidden, residual, positions, order, count, older, older_positions = inputs
    batch, length, dim = three(hidden, "hidden")
    if residual is not None and residual.shape != hidden.shape:
        raise KernelError(f"residual has shape {tuple(residual.shape)}, not {tuple(hidden.shape)}")
    _check_index("positions", positions, (batch, length), hidden)
    if not 0 <= count <= length:
        raise KernelError(f"{count} of {length} tokens cannot stay")
    _check_index("order", order, (batch, length if order.shape[1:] == (length,) else count), hidden)
    if (older is None) != (older_positions is None):
        raise KernelError("older and older_positions go together")
    if older is None or older_positions is None:
        return
    if older.ndim != 3 or older.shape[::2] != (batch, dim) or older.dtype != _stream_dtype(hidden, residual):
        raise KernelError(f"older must be {_stream_dtype(hidden, residual)} of shape ({batch}, tokens, {dim})")
    _check_index("older_positions", older_positions, (batch, older.shape[1]), hidden)


def _stream_dtype(hidden: Tensor, residual: Tensor | None) -> torch.dtype:
    both = hidden.dtype if residual is None else torch.promote_types(hidden.dtype, residual.dtype)
    return torch.promote_types(both, torch.float32)


def _move_fake(
    hidden: Tensor,
    residual: Tensor | None,
    positions: Tensor,
    order: Tensor,
    count: int,
    older: Tensor | None,
    older_positions: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check_move(MoveInputs(hidden, residual, positions, order, count, older, older_positions))
    batch, _, dim = hidden.shape
    dropped = order.shape[1] - count + (0 if older is None else older.shape[1])
    return (
        hidden.new_empty(batch, count, dim),
        hidden.new_empty(0) if residual is None else residual.new_empty(batch, count, dim),
        positions.new_empty(batch, count),
        hidden.new_empty(2, batch, count, dtype=torch.float32),
        hidden.new_empty(batch, dropped, dim, dtype=_stream_dtype(hidden, residual)),
        positions.new_empty(batch, dropped),
    )


def _move_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, residual, _, order, ctx.count, older, _ = inputs
    ctx.length, ctx.hidden_dtype, ctx.older = hidden.shape[1], hidden.dtype, older is not None
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(order)


def _move_backward(
    ctx: Any,
    d_hidden: Tensor | None,
    d_residual: Tensor | None,
    d_positions: Tensor | None,
    d_gaps: Tensor | None,
    d_dropped: Tensor | None,
    d_dropped_positions: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """No two tokens come from one row: gradients are put, and none is added to another."""
    (order,) = ctx.saved_tensors
    now = order.shape[1] - ctx.count
    of_dropped = None if d_dropped is None or not now else d_dropped[:, :now]

    def spread(of_kept: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        parts = [(order[:, : ctx.count], of_kept), (order[:, ctx.count :], of_dropped)]
        result = None
        for rows, gradient in parts:
            if gradient is None:
                continue
            if result is None:
                result = gradient.new_zeros(gradient.shape[0], ctx.length, gradient.shape[2], dtype=dtype)
            result = result.scatter(1, rows[..., None].expand_as(gradient), gradient.to(dtype))
        return result

    to_residual = None if ctx.residual_dtype is None else spread(d_residual, ctx.residual_dtype)
    to_older = d_dropped[:, now:] if ctx.older and d_dropped is not None else None
    return spread(d_hidden, ctx.hidden_dtype), to_residual, None, None, None, to_older, None


define("score_tokens", _score, _score_fake)
define("order_tokens", _order, _order_fake)
define("move_tokens", _move, _move_fake, backward=_move_backward, setup=_move_setup)
