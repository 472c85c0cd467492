"""Merge the tokens with the lowest scores into the next lowest ones: MTR (arXiv 2507.14042), from its description.

The score, there the step size (`delta`), makes three groups: as many *sources* as have to go, as many *targets* above
them (or all that stay, if those are fewer), and tokens that are kept as they are. Each source joins the most similar
target (cosine of the residual streams), and tokens stay in ascending position.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ssmprune_cli.pruning.reduction.base import Reduction, rank
from ssmprune_cli.tokens import TokenSequence, gather_tokens


def _apply(sequence: TokenSequence, score: Tensor, count: int) -> TokenSequence:
    order = rank(sequence, score)  # protected tokens first
    going = order.shape[1] - count
    if not going:
        return sequence
    targets = min(going, count - len(sequence.protected))
    source, target = order[:, count:], order[:, count - targets : count]
    tokens = functional.normalize(sequence.stream, dim=-1)
    likeness = gather_tokens(tokens, source) @ gather_tokens(tokens, target).transpose(1, 2)  # (B, sources, targets)
    into = target.gather(1, likeness.argmax(dim=2))
    stays = torch.ones_like(sequence.positions).scatter(1, source, 0)
    place = stays.cumsum(dim=1) - 1
    return sequence.merge(order[:, :count].sort(dim=1).values, place.scatter(1, source, place.gather(1, into)))


KEEP_TARGET_SOURCE = Reduction(_apply, aligned=True, shortens=True, sized=True)
