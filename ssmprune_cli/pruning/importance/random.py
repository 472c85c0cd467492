"""A random score: the baseline that every other score has to beat."""

from __future__ import annotations

from torch import Tensor

from ssmprune_cli.interface import ScanStatistics
from ssmprune_cli.tokens import TokenSequence

_MASK = (1 << 31) - 1


def random(sequence: TokenSequence, statistics: ScanStatistics, block: int, seed: int) -> Tensor:
    """A hash of position, block and seed: the same in every image, so that a result cannot depend on its batch."""
    value = sequence.positions + (block + 1) * 7919 + (seed + 1) * 104729
    for multiplier in (0x45D9F3B, 0x2C1B3C6D, 0x297A2D39):  # xor-shift and multiply: neighbours become independent
        value = ((value ^ (value >> 16)) * multiplier) & _MASK
    return (value & 0xFFFFFF).float()  # 24 bits are exact in float32
