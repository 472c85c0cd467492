"""Drop the tokens with the lowest scores; the others stay in ascending position (arXiv 2409.18962, section 4)."""

from __future__ import annotations

from torch import Tensor

from ssmprune_cli.pruning.reduction.base import Reduction, keep_best
from ssmprune_cli.tokens import TokenSequence


def _apply(sequence: TokenSequence, score: Tensor, count: int) -> TokenSequence:
    return keep_best(sequence, score, count)


DROP = Reduction(_apply, aligned=True, shortens=True)
