"""What a reduction is, and the ranking that all of them start from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ssmprune_cli.tokens import TokenSequence


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
    largest = torch.finfo(torch.float32).max
    score = torch.nan_to_num(score.float(), nan=-largest, posinf=largest, neginf=-largest)
    score = score.masked_fill(sequence.is_protected(), torch.inf)
    if sequence.live is not None:
        score = score.masked_fill(~sequence.live, -torch.inf)
    return score.argsort(dim=1, descending=True, stable=True)


def ascending(sequence: TokenSequence, score: Tensor, count: int) -> Tensor:
    """(B, count) indices of the tokens that stay, in ascending position."""
    return rank(sequence, score)[:, :count].sort(dim=1).values
