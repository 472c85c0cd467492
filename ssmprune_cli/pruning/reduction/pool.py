"""Freeze tokens, and let them reach the scans through the live token nearest to each: the sum of a cell in one step.

The convolution still sees every token, so the frozen ones have the scan's input u. A live token scans for its cell: its
step size, B, C and u are those of the cell's mean u, and what it puts into the state counts for the whole cell, to the
extent that the alignment `mass` says. Its skip (D) and its gate are its own. A frozen token costs what it costs in
`context`, half of the input projection and the convolution, and the scan keeps its input.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ssmprune_cli.pruning.reduction.base import Reduction, keep_best
from ssmprune_cli.tokens import TokenSequence


def _apply(sequence: TokenSequence, score: Tensor, count: int) -> TokenSequence:
    return replace(keep_best(sequence, score, count, others="frozen"), pooled=True)


POOL = Reduction(_apply, aligned=True, shortens=True, sized=True)
