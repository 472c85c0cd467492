"""Root mean square of a token's residual stream: the plainest score, which looks at no scan. No source; a baseline."""

from __future__ import annotations

from torch import Tensor

from ssmprune_cli.interface import ScanStatistics
from ssmprune_cli.tokens import TokenSequence


def hidden_norm(sequence: TokenSequence, statistics: ScanStatistics, block: int, seed: int) -> Tensor:
    return sequence.stream.square().mean(dim=-1).sqrt()
