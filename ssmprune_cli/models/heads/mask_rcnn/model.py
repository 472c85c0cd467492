"""Mask R-CNN without its encoder: He et al., arXiv 1703.06870, as mmdet 3.3.0 and 2.25.0 evaluate it.

Glossary: a *level* is a map of the feature pyramid; an *anchor* a box that is there before the image is seen; a
*proposal* a box that may hold an object; a *region* what a level shows inside of a box. Letters: B batch, R boxes,
K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ssmprune_cli.errors import UsageError
from ssmprune_cli.models.heads.mask_rcnn.boxes import moved
from ssmprune_cli.models.heads.mask_rcnn.detections import Detections
from ssmprune_cli.models.heads.mask_rcnn.fpn import FeaturePyramid
from ssmprune_cli.models.heads.mask_rcnn.masks import paste
from ssmprune_cli.models.heads.mask_rcnn.nms import suppress
from ssmprune_cli.models.heads.mask_rcnn.roi_head import BOX_CELLS, MASK_CELLS, RoIHead, regions
from ssmprune_cli.models.heads.mask_rcnn.rpn import STRIDES, RegionProposals, propose
from ssmprune_cli.preprocessing import Frame

MIN_SCORE = 0.05  # of a detection, which must be above it
OVERLAP = 0.5  # above which of two boxes of one class one goes
MOST = 100  # detections in an image
STDS = (0.1, 0.1, 0.2, 0.2)


@dataclass(frozen=True)
class MaskRCNNConfig:
    """Everything that defines the head. Raises UsageError for what does not fit.

    in_channels     of the encoder's four maps, the finest first
    channels        of the levels
    hidden          width of the box head
    box_convs       convolutions of the box head, before `box_fcs` linear layers
    normed          whether the feature pyramid has batch norms; a box head's convolutions always have
    original_first  whether boxes go back to the original image before those that overlap go (mmdet 2), or after (3)
    """

    in_channels: tuple[int, ...]
    channels: int = 256
    hidden: int = 1024
    num_classes: int = 80
    box_convs: int = 0
    box_fcs: int = 2
    normed: bool = False
    original_first: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "in_channels", tuple(self.in_channels))
        if len(self.in_channels) != len(STRIDES) - 1 or min(self.in_channels) < 1:
            raise UsageError(f"Mask R-CNN reads {len(STRIDES) - 1} maps, not those of {self.in_channels} channels")
        for name in ("channels", "hidden", "num_classes", "box_fcs"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.box_convs < 0:
            raise UsageError(f"box_convs must not be negative, but {self.box_convs}")


class MaskRCNN(nn.Module):
    """See MaskRCNNConfig. Modules have the authors' names."""

    def __init__(self, config: MaskRCNNConfig) -> None:
        super().__init__()
        self.config = config
        self.neck = FeaturePyramid(config.in_channels, config.channels, normed=config.normed)
        self.rpn_head = RegionProposals(config.channels)
        self.roi_head = RoIHead(
            config.channels, config.hidden, config.num_classes, convs=config.box_convs, fcs=config.box_fcs
        )

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The levels (B, C, h_i, w_i) of the encoder's maps (B, C_i, h_i, w_i), the finest first."""
        levels: tuple[Tensor, ...] = self.neck(features)
        return levels

    @torch.no_grad()
    def detect(self, levels: Sequence[Tensor], frames: Sequence[Frame]) -> list[Detections]:
        """What is in each image, from the levels that `forward` gives."""
        outputs = [(exact(logits), exact(deltas)) for logits, deltas in self.rpn_head(levels)]
        found = []
        for number, frame in enumerate(frames):
            proposals, _ = propose([(logits[number], deltas[number]) for logits, deltas in outputs], frame.scaled)
            found.append(self._judge([level[number] for level in levels], proposals, frame))
        return found

    def _judge(self, levels: Sequence[Tensor], proposals: Tensor, frame: Frame) -> Detections:
        """What is in one image, whose levels are (C, h_i, w_i)."""
        logits, deltas = self.roi_head.bbox_head(regions(levels, proposals, BOX_CELLS))
        boxes, scores, labels = self.choose(proposals, exact(logits), exact(deltas), frame)
        factors = _factors(boxes, frame)
        scaled, original = (boxes * factors, boxes) if self.config.original_first else (boxes, boxes / factors)
        shapes = self.roi_head.mask_head(regions(levels, scaled, MASK_CELLS))
        shapes = exact(shapes[torch.arange(len(labels), device=labels.device), labels]).sigmoid()  # (R, m, m)
        return Detections(original, scores, labels, paste(shapes, original, frame.original))

    def choose(self, proposals: Tensor, logits: Tensor, deltas: Tensor, frame: Frame) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (N, 4), scores (N,) and labels (N,) of the best detections, of logits (R, K + 1) and deltas (R, K, 4)
        of `proposals` (R, 4). Boxes are those of the original image with `original_first`, else of the scaled one."""
        chances = logits.softmax(dim=1)[:, :-1]  # (R, K)
        boxes = moved(proposals[:, None].expand_as(deltas), deltas, STDS, frame.scaled)
        if self.config.original_first:
            boxes = boxes / _factors(boxes, frame)
        box, labels = (chances > MIN_SCORE).nonzero(as_tuple=True)
        boxes, scores = boxes[box, labels], chances[box, labels]
        kept = suppress(boxes, scores, labels, OVERLAP)[:MOST]
        return boxes[kept], scores[kept], labels[kept]


def exact(values: Tensor) -> Tensor:
    """In float32 at least: a coordinate of a thousand pixels needs more bits than half precision has."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _factors(like: Tensor, frame: Frame) -> Tensor:
    """(4,): by how much the image of `frame` grew to its scaled size, for each number of a box."""
    height, width = (after / before for after, before in zip(frame.scaled, frame.original, strict=True))
    return like.new_tensor((width, height, width, height))
