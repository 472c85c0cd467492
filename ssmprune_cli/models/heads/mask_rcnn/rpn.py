"""The region proposal network: which boxes may hold an object. Ren et al., arXiv 1506.01497; mmdet 3.3.0 (RPNHead)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ssmprune_cli.models.heads.mask_rcnn.boxes import ANCHOR_RATIOS, Size, anchors, moved
from ssmprune_cli.models.heads.mask_rcnn.nms import suppress

STRIDES = (4, 8, 16, 32, 64)  # of the levels, in pixels
BEST_OF_LEVEL = 1000  # anchors of each level with the highest scores become boxes
BEST_OF_IMAGE = 1000  # boxes that are handed on
OVERLAP = 0.7  # above which of two boxes of one level one goes
STDS = (1.0, 1.0, 1.0, 1.0)


class RegionProposals(nn.Module):
    """One hidden layer; for every anchor a logit that it holds an object, and how it is to be moved."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        count = len(ANCHOR_RATIOS)
        self.rpn_conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.rpn_cls = nn.Conv2d(channels, count, 1)
        self.rpn_reg = nn.Conv2d(channels, 4 * count, 1)

    def forward(self, levels: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Of each level (B, C, h, w) the logits (B, A, h, w) and the deltas (B, 4 A, h, w) of its anchors."""
        hidden = [functional.relu(self.rpn_conv(level)) for level in levels]
        return [(self.rpn_cls(each), self.rpn_reg(each)) for each in hidden]


def propose(outputs: Sequence[tuple[Tensor, Tensor]], size: Size) -> tuple[Tensor, Tensor]:
    """Boxes (R, 4) and scores (R,) of one image, best first.

    outputs  of each level the logits (A, h, w) and the deltas (4 A, h, w)
    size     height and width of the image without padding, in pixels
    """
    found = []
    for number, ((logits, deltas), stride) in enumerate(zip(outputs, STRIDES, strict=True)):
        scores = logits.permute(1, 2, 0).flatten().sigmoid()  # (h * w * A,)
        best = scores.argsort(descending=True, stable=True)[:BEST_OF_LEVEL]
        boxes = anchors((logits.shape[1], logits.shape[2]), stride, logits)[best]
        boxes = moved(boxes, deltas.permute(1, 2, 0).reshape(-1, 4)[best], STDS, size)
        found.append((boxes, scores[best], torch.full_like(best, number)))
    boxes, scores, level = (torch.cat(each) for each in zip(*found, strict=True))
    inside = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    boxes, scores, level = boxes[inside], scores[inside], level[inside]
    kept = suppress(boxes, scores, level, OVERLAP)[:BEST_OF_IMAGE]
    return boxes[kept], scores[kept]
