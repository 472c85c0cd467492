"""Scan routes over a grid of tokens, dense or with tokens missing: who is visited when, and what is skipped.

Letters: B batch, L tokens now, G tokens of the dense grid. A route is the order in which a scan visits the dense grid:
(G,) positions. Its inverse gives every position its rank. Kept tokens are visited in the order of their ranks, and the
difference of two neighbouring ranks, less one, is the number of dropped tokens that the scan skips between them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ssmprune_cli.grids import gaps_by_size
from ssmprune_cli.tokens import TokenSequence, gather_tokens


@dataclass(frozen=True)
class Visits:
    """One route through the tokens of a sequence.

    order   (L,) or (B, L) index into the sequence of the token that each step of the scan visits
    back    the inverse: at which step each token is visited
    ranks   as `order`: the step at which the dense scan visits the same token
    gap     (B, L) float32 dropped tokens skipped just before each step; None when no token is missing or merged
    """

    order: Tensor
    back: Tensor
    ranks: Tensor
    gap: Tensor | None


def visits(route: Tensor, sequence: TokenSequence) -> Visits:
    """How a scan along `route` (G,) goes through `sequence`, whose positions index its grid."""
    dense_ranks = inverse(route)
    if sequence.is_dense:
        gap = None if sequence.merged is None else gaps_by_size(sequence.sizes()[:, route])
        return Visits(route, dense_ranks, torch.arange(len(route), device=route.device), gap)
    ranks, order = dense_ranks[sequence.positions].sort(dim=1)  # (B, L)
    # The first step skips nothing: the state is still zero there, so what was dropped before it cannot matter.
    gap = ranks.diff(dim=1, prepend=ranks[:, :1] - 1) - 1
    return Visits(order, order.argsort(dim=1), ranks, gap.float())


def inverse(route: Tensor) -> Tensor:
    """(G,) rank of every position."""
    # Not written place by place: torch.compile (2.13) would share one buffer among several inverses.
    return route.argsort()


def reorder(values: Tensor, index: Tensor) -> Tensor:
    """Rows of `values` (B, L, c) in the order `index`, (L,) for all samples alike or (B, L)."""
    if index.ndim == 1 and not (torch.is_grad_enabled() and values.requires_grad):
        return values[:, index]  # the quickest, but its gradient takes ten times as long as that of whole rows
    return gather_tokens(values, index.expand(values.shape[0], -1))


def steps_of(back: Tensor, tokens: Tensor) -> Tensor:
    """(B, K) step at which each of `tokens` (B, K) is visited; `back` (L,) or (B, L) as in Visits."""
    return back[tokens] if back.ndim == 1 else back.gather(1, tokens)
