"""Average each pruned token into the kept patch token that is nearest in scan position.

The kept token then stands for its cell, and the alignment `mass` enlarges its step by part of the cell's size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssmprune_cli.pruning.reduction.base import Reduction, rank
from ssmprune_cli.tokens import TokenSequence, nearest


def _apply(sequence: TokenSequence, score: Tensor, count: int) -> TokenSequence:
    kept = rank(sequence, score)[:, :count]  # protected tokens first
    place = torch.zeros_like(sequence.positions).scatter(1, kept, 1).cumsum(dim=1) - 1  # of a kept token among those
    patches = kept[:, len(sequence.protected) :]
    closest = patches.gather(1, nearest(sequence.positions.gather(1, patches), sequence.positions))  # (B, L)
    # A protected token takes in nobody but itself.
    target = torch.where(sequence.is_protected(), place, place.gather(1, closest))
    return sequence.merge(kept.sort(dim=1).values, target)


LOCAL_MERGE = Reduction(_apply, aligned=True, shortens=True, sized=True)
