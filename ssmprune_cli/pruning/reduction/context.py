"""Drop tokens from scans, and let the convolutions of the kept ones go on seeing them, as they were when they left.

The causal convolution before a scan otherwise meets the wrong neighbours. A dropped token costs half of the input
projection and its share of the convolution, about a fifth of a kept one.
"""

from __future__ import annotations

from torch import Tensor

from ssmprune_cli.pruning.reduction.base import Reduction, keep_best
from ssmprune_cli.tokens import TokenSequence


def _apply(sequence: TokenSequence, score: Tensor, count: int) -> TokenSequence:
    return keep_best(sequence, score, count, others="context")


CONTEXT = Reduction(_apply, aligned=True, shortens=True)
