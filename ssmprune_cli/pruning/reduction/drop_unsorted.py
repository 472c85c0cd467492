"""For comparison only: drop, and leave the kept patch tokens in score order, as token pruning for ViTs does.

Protected tokens sit where ascending order would have put them, so that the patch order is all that differs from `drop`.
"""

from __future__ import annotations

from torch import Tensor

from ssmprune_cli.pruning.reduction.base import Reduction, rank
from ssmprune_cli.tokens import TokenSequence


def _apply(sequence: TokenSequence, score: Tensor, count: int) -> TokenSequence:
    best = rank(sequence, score)[:, :count]  # (B, K), protected tokens first
    ascending = best.gather(1, sequence.positions.gather(1, best).argsort(dim=1))
    patch_slot = ~sequence.is_protected().gather(1, ascending)  # (B, K)
    number = patch_slot.int().cumsum(dim=1) - 1 + len(sequence.protected)  # which entry of `best` a patch slot takes
    by_score = best.gather(1, number.clamp(min=0, max=count - 1).long())
    return sequence.keep(by_score.where(patch_slot, ascending))


DROP_UNSORTED = Reduction(_apply, aligned=False, shortens=True, baseline=True)
