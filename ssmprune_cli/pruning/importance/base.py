"""What an importance score is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ssmprune_cli.interface import ScanStatistics, Wanted
from ssmprune_cli.tokens import TokenSequence

Score = Callable[[TokenSequence, ScanStatistics, int, int], Tensor]


@dataclass(frozen=True)
class Importance:
    """`score` (sequence, statistics of the block before it, block number, seed) -> (B, L); the largest stay.

    needs  what it looks at of the scans, which mixers hand out only when asked
    """

    score: Score
    needs: Wanted = "y"
