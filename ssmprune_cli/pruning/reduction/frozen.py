"""Freeze tokens instead of dropping them: no block updates them, and they go on feeding the scans and convolutions.

What a scan loses by dropping is its input. A frozen token gives it its last hidden state, normalised by each block
anew: half of the input projection, the convolution, its step and B. It gets no gate, no output and no read-out of the
state. It costs half to two thirds of a live token. Three ways to make that cheaper: `frozen-once` freezes until the
next prune point, then drops for good; `frozen-near` freezes the half that is nearest to live tokens, and leaves the
others to the convolutions; `frozen-pairs` averages neighbouring frozen tokens two by two, each pair with the size 2
(see the alignment `mass`). Projections cannot be reused from block to block: each block has its own.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ssmprune_cli.pruning.reduction.base import Reduction, keep_best
from ssmprune_cli.tokens import Dropped, TokenSequence, nearest


def _frozen(sequence: TokenSequence, score: Tensor, count: int) -> TokenSequence:
    return keep_best(sequence, score, count, others="frozen")


def _once(sequence: TokenSequence, score: Tensor, count: int) -> TokenSequence:
    return keep_best(sequence.retire(), score, count, others="frozen")


def _pairs(sequence: TokenSequence, score: Tensor, count: int) -> TokenSequence:
    kept = keep_best(replace(sequence, frozen=None), score, count, others="frozen")
    assert kept.frozen is not None
    gone = kept.frozen.join(kept.gone) if kept.restorable else None  # a pair is not what left its two places
    return replace(kept, frozen=_paired(kept.frozen).join(sequence.frozen), gone=gone)


def _near(sequence: TokenSequence, score: Tensor, count: int) -> TokenSequence:
    kept = keep_best(sequence, score, count, others="frozen")
    tokens = kept.frozen
    assert tokens is not None
    closest = kept.positions.gather(1, nearest(kept.positions, tokens.positions))
    distance = (tokens.positions - closest).abs()  # (B, F)
    order, half = distance.argsort(dim=1, stable=True), -(-distance.shape[1] // 2)
    return replace(kept, frozen=tokens.take(order[:, :half]), context=tokens.take(order[:, half:]).join(kept.context))


def _paired(tokens: Dropped) -> Dropped:
    """Each two neighbours averaged at the place of the first; the last of an odd number stays as it is."""
    length = tokens.positions.shape[1]
    pairs = length // 2
    first, second = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
    size = torch.ones_like(tokens.positions, dtype=torch.float32) if tokens.size is None else tokens.size
    joint = size[:, first] + size[:, second]  # (B, pairs)
    weight = (size[:, first] / joint)[..., None]
    mean = tokens.stream[:, first] * weight + tokens.stream[:, second] * (1 - weight)
    rest = slice(2 * pairs, length)
    return Dropped(
        torch.cat((mean, tokens.stream[:, rest]), dim=1),
        torch.cat((tokens.positions[:, first], tokens.positions[:, rest]), dim=1),
        torch.cat((joint, size[:, rest]), dim=1),
    )


FROZEN = Reduction(_frozen, aligned=True, shortens=True)
FROZEN_ONCE = Reduction(_once, aligned=True, shortens=True)
FROZEN_NEAR = Reduction(_near, aligned=True, shortens=True)
FROZEN_PAIRS = Reduction(_pairs, aligned=True, shortens=True, sized=True)
