"""Average each pruned token into the kept patch token that is nearest in scan position.

The kept token then stands for its cell, and the alignment `mass` enlarges its step by part of the cell's size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssmprune_cli.pruning.reduction.base import Reduction, ascending
from ssmprune_cli.tokens import TokenSequence


def _apply(sequence: TokenSequence, score: Tensor, count: int) -> TokenSequence:
    index = ascending(sequence, score, count)
    kept = sequence.positions.gather(1, index)  # (B, K)
    distance = (sequence.positions[:, :, None] - kept[:, None, :]).abs()  # (B, L, K)
    # A protected token takes in nobody but itself.
    closed = sequence.is_protected().gather(1, index)[:, None, :] & (distance > 0)
    target = distance.masked_fill(closed, torch.iinfo(distance.dtype).max).argmin(dim=2)  # of two, the one before
    return sequence.merge(index, target)


LOCAL_MERGE = Reduction(_apply, aligned=True, shortens=True, sized=True)
