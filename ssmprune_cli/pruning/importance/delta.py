"""Mean step size over channels and directions: how much a token writes into the state.

Source: the score of MTR (arXiv 2507.14042) and MaMe (arXiv 2508.13599), from their descriptions.
"""

from __future__ import annotations

from functools import reduce
from operator import add

from torch import Tensor

from ssmprune_cli.interface import ScanStatistics
from ssmprune_cli.tokens import TokenSequence


def delta(sequence: TokenSequence, statistics: ScanStatistics, block: int, seed: int) -> Tensor:
    return reduce(add, statistics.delta).mean(dim=-1) / len(statistics.delta)
