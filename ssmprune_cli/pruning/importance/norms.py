"""l1 and l2 norms of the scan output, divided by the number of channels. Source: arXiv 2409.18962, table 4."""

from __future__ import annotations

from torch import Tensor

from ssmprune_cli.interface import ScanStatistics
from ssmprune_cli.kernels import score_tokens
from ssmprune_cli.tokens import TokenSequence


def l1(sequence: TokenSequence, statistics: ScanStatistics, block: int, seed: int) -> Tensor:
    return score_tokens(statistics.y, "l1")


def l2(sequence: TokenSequence, statistics: ScanStatistics, block: int, seed: int) -> Tensor:
    return score_tokens(statistics.y, "l2")
