"""Fuse the dropped tokens into one: EViT (arXiv 2202.07800), from its description.

The fused token is their mean, weighted by how far each score lies above the lowest one in the image (so that scores
below zero weigh too), and one of the tokens that stay. It stands where the best of them stood, so that the order of
positions has a place for it; its size is all of theirs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssmprune_cli.pruning.reduction.base import Reduction, rank
from ssmprune_cli.tokens import TokenSequence


def _apply(sequence: TokenSequence, score: Tensor, count: int) -> TokenSequence:
    order = rank(sequence, score)
    index = order[:, :count].sort(dim=1).values  # the last of the ranks becomes the fused token
    fused, others = order[:, count - 1 : count], order[:, count:]
    stays = torch.ones_like(sequence.positions).scatter(1, others, 0)
    place = stays.cumsum(dim=1) - 1
    target = place.scatter(1, others, place.gather(1, fused).expand_as(others))
    # Weights are above 0, whatever the score: its differences from the lowest, and a thousandth of their mean.
    weight = torch.nan_to_num(score.float(), nan=0.0, posinf=0.0, neginf=0.0)
    weight = weight - weight.amin(dim=1, keepdim=True)
    return sequence.merge(index, target, weight + 1e-3 * weight.mean(dim=1, keepdim=True) + 1e-6)


FUSE = Reduction(_apply, aligned=True, shortens=True, sized=True)
