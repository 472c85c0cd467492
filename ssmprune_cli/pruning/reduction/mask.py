"""For comparison only: zero the dropped tokens and keep the length (the masking branch of ZLKong/ToP-ViM b5bc231).

It saves nothing. A zeroed token still moves the state: its step is that of what the causal convolution leaks into it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ssmprune_cli.pruning.reduction.base import Reduction, rank
from ssmprune_cli.tokens import TokenSequence


def _apply(sequence: TokenSequence, score: Tensor, count: int) -> TokenSequence:
    kept = rank(sequence, score)[:, :count]
    dead = torch.zeros_like(sequence.positions, dtype=torch.bool)
    live = dead.scatter(1, kept, torch.ones_like(kept, dtype=torch.bool))
    weight = live.to(sequence.hidden.dtype)[..., None]  # (B, L, 1)
    residual = None if sequence.residual is None else sequence.residual * weight.to(sequence.residual.dtype)
    return replace(sequence, hidden=sequence.hidden * weight, residual=residual, live=live)


MASK = Reduction(_apply, aligned=False, shortens=False, baseline=True)
