"""What a convolution along the sequence meets where tokens are missing from it, but still in its sight."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ssmprune_cli.tokens import Derivation, TokenSequence

_SOURCES = Derivation[Tensor]("sources of a causal convolution")


def conv_sources(sequence: TokenSequence, width: int) -> Tensor:
    """(2, B, T, K): which row of the live tokens followed by `sequence.frozen` and by `sequence.context` each tap of a
    causal convolution meets, and of one in reverse: that of the token so many places away among them all, or -1 beyond
    the ends. The T tokens are the live and frozen ones, in ascending position if there are any frozen ones."""

    def compute() -> Tensor:
        order, rank = _together(sequence)
        beyond = width - 1  # what a tap may meet at either end
        rows = functional.pad(order, (beyond, beyond), value=-1)
        taps = torch.arange(width, device=order.device)
        wanted = rank[..., None] + torch.stack((taps, 2 * beyond - taps))[:, None, None]  # (2, B, T, K)
        return rows.expand(2, -1, -1).gather(2, wanted.flatten(2)).view_as(wanted)

    return sequence.geometry.once(_SOURCES, compute, width)


_CENTRED = Derivation[Tensor]("sources of a centred convolution")


def centred_sources(sequence: TokenSequence, width: int) -> Tensor:
    """(B, T, K): likewise for a convolution of odd width that looks as far ahead as back."""

    def compute() -> Tensor:
        order, rank = _together(sequence)
        rows = functional.pad(order, (width // 2, width // 2), value=-1)
        wanted = rank[..., None] + torch.arange(width, device=order.device)  # (B, T, K)
        return rows.gather(1, wanted.flatten(1)).view_as(wanted)

    return sequence.geometry.once(_CENTRED, compute, width)


def _together(sequence: TokenSequence) -> tuple[Tensor, Tensor]:
    """Live, frozen and context tokens in ascending position: their rows (B, L + F + M), one group after the other, and
    the place of each of the T tokens among them (B, T)."""
    groups = [each.positions for each in (sequence, sequence.frozen, sequence.context) if each is not None]
    positions = torch.cat(groups, dim=1)
    tokens = groups[0] if sequence.frozen is None else torch.cat(groups[:2], dim=1)
    places = torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
    if positions.shape[1] == sequence.length:  # none is missing: a position is a place
        order, rank = torch.empty_like(positions).scatter(1, positions, places), tokens
    else:
        order = positions.argsort(dim=1)
        rank = torch.empty_like(order).scatter(1, order, places)[:, : tokens.shape[1]]
    return order, rank if sequence.frozen is None else rank.sort(dim=1).values
