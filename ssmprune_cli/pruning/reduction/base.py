"""What a reduction is, and the ranking and the dropping that most of them start from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ssmprune_cli.kernels import move_tokens, order_tokens, rank_tokens
from ssmprune_cli.tokens import Dropped, Fate, Geometry, TokenSequence, joined_sizes


@dataclass(frozen=True)
class Reduction:
    """`apply` (sequence, score (B, L), K) -> the sequence that goes on; K counts protected tokens.

    `aligned` says whether the result has gaps in ascending order, so that a scan can be aligned over them.
    `shortens` says whether it costs less than the dense model. `sized` says whether its tokens have sizes.
    `rectangular` says whether a whole grid is left, which later stages start from: see `grids.fitting`. A `baseline`
    is for comparison only: no search tries it unless it is named.
    """

    apply: Callable[[TokenSequence, Tensor, int], TokenSequence]
    aligned: bool
    shortens: bool
    sized: bool = False
    rectangular: bool = False
    baseline: bool = False


def rank(sequence: TokenSequence, score: Tensor) -> Tensor:
    """(B, L) token indices, best first: protected tokens, then live ones by falling score, then dead ones.

    Equal scores keep their order, so ties are settled by position, and so is the order of protected and of dead tokens.
    A NaN score counts as the lowest.
    """
    return rank_tokens(score, sequence.positions, sequence.protected, sequence.live)


def keep_best(sequence: TokenSequence, score: Tensor, count: int, *, others: Fate = "gone") -> TokenSequence:
    """Keep the first `count` of `rank`, in ascending position; `others` says what the rest is still good for."""
    positions, size, live = sequence.positions, sequence.size, sequence.live
    seen = others != "gone" or sequence.restorable
    older: Dropped | None = getattr(sequence, others) if seen else None
    order = order_tokens(score, positions, sequence.protected, count, live=live, others=seen)
    moved = move_tokens(
        sequence.hidden,
        sequence.residual,
        positions,
        order,
        count,
        older=None if older is None else older.stream,
        older_positions=None if older is None else older.positions,
    )
    best, rest = order[:, :count], order[:, count:]
    fates: dict[str, Any] = {}
    if seen:
        sizes = [(None if size is None else size.gather(1, rest), rest)]
        sizes += [] if older is None else [(older.size, older.positions)]
        fates[others] = Dropped(moved.dropped, moved.dropped_positions, joined_sizes(*zip(*sizes, strict=True)))
    return replace(
        sequence,
        hidden=moved.hidden,
        residual=None if sequence.residual is None else moved.residual,
        positions=moved.positions,
        size=None if size is None else size.gather(1, best),
        live=None if live is None else live.gather(1, best),
        geometry=Geometry() if sequence.merged is not None else Geometry.of_gaps(moved.gaps),
        **fates,
    )
