"""Merge similar tokens, pairwise and in order.

`merge`: the bipartite matching of ToMe (arXiv 2210.09461), as R-MeeTo (arXiv 2412.12496) uses it for Vim. Patch tokens
are dealt to two groups in turn; each of the first finds the most similar of the second (cosine of the residual
streams), and the most similar pairs become one token: the size-weighted mean, at the place of the second. So tokens
stay in ascending position. A round can merge half of the tokens at most; there are as many rounds as it takes. The
score is not used.

`hybrid`: half of the tokens that have to go are dropped, those with the lowest scores, and half are merged, in the
manner of ToR (arXiv 2410.14725) for language models. All from descriptions.

What alignment means: a merged token stands at its position and leaves a gap where the other was, which the decay
sources count as any gap. `mass` goes by the size instead.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ssmprune_cli.pruning.reduction.base import Reduction, keep_best
from ssmprune_cli.tokens import TokenSequence, gather_tokens


def _merge(sequence: TokenSequence, score: Tensor, count: int) -> TokenSequence:
    while sequence.positions.shape[1] > count:
        sequence = _round(sequence, count)
    return sequence


def _hybrid(sequence: TokenSequence, score: Tensor, count: int) -> TokenSequence:
    dropped = (sequence.positions.shape[1] - count) // 2
    left = keep_best(sequence, score, sequence.positions.shape[1] - dropped)
    return _merge(left, score, count)


def _round(sequence: TokenSequence, count: int) -> TokenSequence:
    """Merge as many pairs as there are in two equal groups, but leave `count` tokens."""
    length = sequence.positions.shape[1]
    patches = length - len(sequence.protected)
    merged = min(length - count, patches // 2)
    places = sequence.is_protected().int().argsort(dim=1, stable=True)[:, :patches]  # patch tokens, in order
    first, second = places[:, 0::2], places[:, 1::2]
    tokens = functional.normalize(sequence.stream, dim=-1)
    likeness = gather_tokens(tokens, first) @ gather_tokens(tokens, second).transpose(1, 2)  # (B, n, m)
    best, partner = likeness.max(dim=2)
    order = best.argsort(dim=1, descending=True, stable=True)[:, :merged]
    source, into = first.gather(1, order), second.gather(1, partner.gather(1, order))
    stays = torch.ones_like(sequence.positions).scatter(1, source, 0)
    index = stays.argsort(dim=1, descending=True, stable=True)[:, : length - merged]  # ascending, as the sort is stable
    rank = stays.cumsum(dim=1) - 1
    return sequence.merge(index, rank.scatter(1, source, rank.gather(1, into)))


MERGE = Reduction(_merge, aligned=True, shortens=True, sized=True)
HYBRID = Reduction(_hybrid, aligned=True, shortens=True, sized=True)
