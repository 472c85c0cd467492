"""Mean over channels of the scan output. Source: arXiv 2409.18962, table 4 ("w/o clip")."""

from __future__ import annotations

from torch import Tensor

from ssmprune_cli.interface import ScanStatistics
from ssmprune_cli.kernels import score_tokens
from ssmprune_cli.tokens import TokenSequence


def mean(sequence: TokenSequence, statistics: ScanStatistics, block: int, seed: int) -> Tensor:
    return score_tokens(statistics.y, "mean")
