"""l1 and l2 norms of the scan output, divided by the number of channels. Source: arXiv 2409.18962, table 4."""

from __future__ import annotations

from torch import Tensor

from ssmprune_cli.interface import ScanStatistics
from ssmprune_cli.pruning.importance.base import scan_output
from ssmprune_cli.tokens import TokenSequence


def l1(sequence: TokenSequence, statistics: ScanStatistics, block: int, seed: int) -> Tensor:
    return scan_output(statistics).abs().mean(dim=-1)


def l2(sequence: TokenSequence, statistics: ScanStatistics, block: int, seed: int) -> Tensor:
    return scan_output(statistics).square().mean(dim=-1).sqrt()
