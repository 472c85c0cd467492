"""What a causal convolution meets where tokens are missing from the sequence, but still in its sight."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ssmprune_cli.tokens import TokenSequence


def conv_sources(sequence: TokenSequence, width: int, *, reverse: bool) -> Tensor:
    """(B, L, K): which row of the live tokens followed by `sequence.context` each tap of a causal convolution meets:
    that of the token so many places away among both, or -1 beyond the ends."""
    key = f"sources {width} {reverse}"
    if key not in sequence.memo:
        order, rank = _together(sequence)
        beyond = width - 1  # what a tap may meet at either end
        rows = functional.pad(order, (beyond, beyond), value=-1)
        taps = torch.arange(width, device=order.device)
        wanted = rank[..., None] + (2 * beyond - taps if reverse else taps)  # (B, L, K)
        sequence.memo[key] = rows.gather(1, wanted.flatten(1)).view_as(wanted)
    sources: Tensor = sequence.memo[key]
    return sources


def _together(sequence: TokenSequence) -> tuple[Tensor, Tensor]:
    """Live tokens and `sequence.context` in ascending position: their rows (B, L + M), the live ones first, and the
    place of each live one among them (B, L)."""
    if "together" not in sequence.memo:
        assert sequence.context is not None
        order = torch.cat((sequence.positions, sequence.context.positions), dim=1).argsort(dim=1)
        places = torch.arange(order.shape[1], device=order.device).expand_as(order)
        rank = torch.empty_like(order).scatter(1, order, places)[:, : sequence.positions.shape[1]]
        sequence.memo["together"] = (order, rank)
    order, rank = sequence.memo["together"]
    return order, rank
