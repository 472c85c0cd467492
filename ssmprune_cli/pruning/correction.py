"""What a repair leaves in a pruner: a head of its own, and projections of the tokens that were dropped.

Letters: B batch, d what the head sees, w width of the tokens at a prune point.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ssmprune_cli.tokens import TokenSequence

# What a pruner holds. "side" is what "head+side" becomes when its head has become the model's own, for fine-tuning.
Held = Literal["none", "head", "head+side", "side"]
Kind = Literal["none", "head", "head+side"]

EPS = 1e-5


@dataclass(frozen=True)
class Correction:
    """Logits = weight (x + sum over points of side[point] r_point) + bias: x is what the head sees of the tokens that
    are left, r_point the `dropped_mean` of those that left there.

    head  weight (classes, d) and bias (classes,), or None for the model's own
    side  (d, w) for each prune point (number of blocks) that has a part in it
    """

    head: tuple[Tensor, Tensor] | None = None
    side: Mapping[int, Tensor] = field(default_factory=dict)

    @property
    def held(self) -> Held:
        if self.head is None:
            return "side" if self.side else "none"
        return "head+side" if self.side else "head"


def dropped_mean(before: TokenSequence, after: TokenSequence) -> Tensor:
    """(B, w) float32 at least: the mean of the tokens of `before` that `after` lacks, each divided by its root mean
    square. There must be one."""
    lost = before.lost(after)
    return (lost * torch.rsqrt(lost.square().mean(dim=-1, keepdim=True) + EPS)).mean(dim=1)


@dataclass(frozen=True)
class Repaired:
    """What came of a repair. Divergences are means of KL(dense || pruned) in nats on images held back from the fit.

    kind       what the guard accepted
    images     unlabelled images in all
    held_back  of them, those that were judged; no fit that was judged had seen them
    before     divergence of the pruned model; None where nothing was tried
    after      that of the repaired one; None where nothing was accepted
    change     95 % interval of the difference `after` - `before`
    refused    kinds that were not accepted, and why
    judged     divergences (held_back,) of those images: repaired, or as they were if nothing was accepted
    warnings   what to know before trusting it
    seconds    that it took
    """

    kind: Kind
    images: int
    held_back: int = 0
    before: float | None = None
    after: float | None = None
    change: tuple[float, float] | None = None
    refused: Mapping[str, str] = field(default_factory=dict, repr=False)
    judged: Tensor | None = field(default=None, repr=False, compare=False)
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0
