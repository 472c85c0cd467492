"""Cosine of a token's residual stream with the class token's (the mean of several, or of registers),
or with the mean token's where a model has none.

Source: the likeness to the class token is what EViT (arXiv 2202.07800) reads off its attention; an SSM has no
attention, so it is computed.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from ssmprune_cli.interface import ScanStatistics
from ssmprune_cli.tokens import TokenSequence


def class_similarity(sequence: TokenSequence, statistics: ScanStatistics, block: int, seed: int) -> Tensor:
    stream = sequence.stream
    centre = sequence.protected_stream().mean(dim=1) if sequence.protected else sequence.mean(stream)  # (B, d)
    return functional.cosine_similarity(stream, centre[:, None], dim=-1)
