"""Mean over channels of the positive part of the scan output. Source: arXiv 2409.18962, section 4.2 (its default)."""

from __future__ import annotations

from torch import Tensor

from ssmprune_cli.interface import ScanStatistics
from ssmprune_cli.pruning.importance.base import scan_output
from ssmprune_cli.tokens import TokenSequence


def clip(sequence: TokenSequence, statistics: ScanStatistics, block: int, seed: int) -> Tensor:
    return scan_output(statistics).clamp(min=0).mean(dim=-1)
