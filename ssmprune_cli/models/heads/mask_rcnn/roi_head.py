"""What is in a box: its class, a better box, and the mask of the object. He et al., arXiv 1703.06870; mmdet 3.3.0.

Letters: R boxes, C channels, K classes, n cells of a side of a box.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional

from ssmprune_cli.models.heads.mask_rcnn.layers import Convolution
from ssmprune_cli.models.heads.mask_rcnn.roi_align import roi_align
from ssmprune_cli.models.heads.mask_rcnn.rpn import STRIDES

BOX_CELLS = 7
MASK_CELLS = 14
MASK_CONVS = 4
FINEST = 56.0  # pixels: twice this is the side of the square boxes from which on the second level is read


class BoxHead(nn.Module):
    """`convs` convolutions and `fcs` linear layers, for all classes together; then logits and deltas of every class."""

    def __init__(self, channels: int, hidden: int, classes: int, *, convs: int, fcs: int) -> None:
        super().__init__()
        self.shared_convs = nn.ModuleList(Convolution(channels, channels, 3, normed=True) for _ in range(convs))
        widths = [channels * BOX_CELLS**2, *[hidden] * fcs]
        self.shared_fcs = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))
        self.fc_cls = nn.Linear(hidden, classes + 1)  # the last one is the background
        self.fc_reg = nn.Linear(hidden, 4 * classes)

    def forward(self, regions: Tensor) -> tuple[Tensor, Tensor]:
        """Regions (R, C, n, n) to logits (R, K + 1) and deltas (R, K, 4)."""
        for conv in self.shared_convs:
            regions = functional.relu(conv(regions))
        hidden = regions.flatten(1)
        for layer in self.shared_fcs:
            hidden = functional.relu(layer(hidden))
        return self.fc_cls(hidden), self.fc_reg(hidden).unflatten(1, (-1, 4))


class MaskHead(nn.Module):
    """Convolutions, and a grid of twice as many cells; then a logit of every class for each cell."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(Convolution(channels, channels, 3, normed=False) for _ in range(MASK_CONVS))
        self.upsample = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.conv_logits = nn.Conv2d(channels, classes, 1)

    def forward(self, regions: Tensor) -> Tensor:
        """Regions (R, C, n, n) to logits (R, K, 2 n, 2 n)."""
        for conv in self.convs:
            regions = functional.relu(conv(regions))
        logits: Tensor = self.conv_logits(functional.relu(self.upsample(regions)))
        return logits


class RoIHead(nn.Module):
    """See BoxHead and MaskHead."""

    def __init__(self, channels: int, hidden: int, classes: int, *, convs: int, fcs: int) -> None:
        super().__init__()
        self.bbox_head = BoxHead(channels, hidden, classes, convs=convs, fcs=fcs)
        self.mask_head = MaskHead(channels, classes)


def regions(levels: Sequence[Tensor], boxes: Tensor, cells: int) -> Tensor:
    """(R, C, n, n): what the levels (C, h, w) of one image show inside of `boxes` (R, 4). A box is read from the level
    whose cells fit its size; of the levels the last one is never read."""
    sides = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).sqrt()
    number = (sides / FINEST + 1e-6).log2().floor().clamp(0, len(levels) - 2).long()
    result = levels[0].new_zeros(len(boxes), levels[0].shape[0], cells, cells)
    for level, (features, stride) in enumerate(zip(levels[:-1], STRIDES, strict=False)):
        members = (number == level).nonzero()[:, 0]
        result[members] = roi_align(features, boxes[members], cells, stride)
    return result
