"""Non-maximum suppression: of boxes that overlap, the one with the highest score stays.

torchvision's is used where it imports. The one here has its semantics: a box goes if its overlap with a better one that
stays is above the threshold. Letters: N boxes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssmprune_cli.models.heads.mask_rcnn.vision import torchvision_ops


def suppress(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float) -> Tensor:
    """Indices (K,) of the boxes that stay, best first. Boxes (N, 4) of different `groups` (N,) never touch each other.

    Groups are moved apart, as mmcv does it: overlaps are those of coordinates that were rounded so.
    """
    if not len(boxes):
        return groups
    apart = boxes + (groups.to(boxes) * (boxes.max() + 1))[:, None]
    ops = torchvision_ops()
    if ops is not None:
        kept: Tensor = ops.nms(apart, scores, threshold)
        return kept
    order = scores.argsort(descending=True, stable=True)
    stays = torch.empty_like(order, dtype=torch.bool)  # in that order
    apart, groups = apart[order], groups[order]
    for group in groups.unique():
        members = (groups == group).nonzero()[:, 0]
        stays[members] = _stays(overlaps(apart[members]) > threshold)
    return order[stays]


def _stays(over: Tensor) -> Tensor:
    """(N,) bool: what a pass from the best box to the worst leaves, `over` (N, N) saying which pairs overlap."""
    before = over.triu(diagonal=1).float()  # only a better box takes away another one
    stays = torch.ones_like(before[0])
    while True:
        # The first box stays. Each round settles at least the next box, so nothing changes once all are settled.
        after = (stays @ before == 0).float()  # by none that stays itself
        if torch.equal(after, stays):
            return after.bool()
        stays = after


def overlaps(boxes: Tensor) -> Tensor:
    """(N, N): intersection over union of each pair of `boxes` (N, 4)."""
    low = torch.maximum(boxes[:, None, :2], boxes[:, :2])
    high = torch.minimum(boxes[:, None, 2:], boxes[:, 2:])
    shared = (high - low).clamp(min=0).prod(dim=2)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    return shared / (areas[:, None] + areas - shared)
