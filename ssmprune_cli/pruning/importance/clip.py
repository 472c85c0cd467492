"""Mean over channels of the positive part of the scan output. Source: arXiv 2409.18962, section 4.2 (its default)."""

from __future__ import annotations

from torch import Tensor

from ssmprune_cli.interface import ScanStatistics
from ssmprune_cli.kernels import score_tokens
from ssmprune_cli.tokens import TokenSequence


def clip(sequence: TokenSequence, statistics: ScanStatistics, block: int, seed: int) -> Tensor:
    return score_tokens(statistics.y, "clip")
