"""Heads of Mask R-CNN in checkpoints: which configuration their names and shapes are of."""

from __future__ import annotations

from collections.abc import Mapping

from ssmprune_cli.errors import CheckpointError, UsageError
from ssmprune_cli.models.heads.mask_rcnn import model, roi_head, rpn
from ssmprune_cli.models.heads.mask_rcnn.boxes import ANCHOR_RATIOS, ANCHOR_SCALE
from ssmprune_cli.models.heads.mask_rcnn.masks import THRESHOLD
from ssmprune_cli.models.heads.mask_rcnn.model import MaskRCNNConfig

# What no weight's shape tells, and only one way is computed here: of testing, and of training where names are equal.
MASK_RCNN_COMPUTES = {
    "model": frozenset({"maskrcnn"}),
    "neck": frozenset({"fpn"}),
    "rpn_head": frozenset({"rpnhead"}),
    "roi_head": frozenset({"standardroihead"}),
    "bbox_head": frozenset({"shared2fcbboxhead", "shared4conv1fcbboxhead"}),
    "mask_head": frozenset({"fcnmaskhead"}),
    "bbox_roi_extractor": frozenset({"singleroiextractor"}),
    "mask_roi_extractor": frozenset({"singleroiextractor"}),
    "roi_layer": frozenset({"roialign"}),
    "sampling_ratio": frozenset({0}),
    "finest_scale": frozenset({roi_head.FINEST}),
    "anchor_generator": frozenset({"anchorgenerator"}),
    "scales": frozenset({(ANCHOR_SCALE,)}),
    "ratios": frozenset({ANCHOR_RATIOS}),
    "bbox_coder": frozenset({"deltaxywhbboxcoder"}),
    "target_means": frozenset({(0.0, 0.0, 0.0, 0.0)}),
    "target_stds": frozenset({rpn.STDS, model.STDS}),
    "reg_class_agnostic": frozenset({False}),
    "class_agnostic": frozenset({False}),
    "nms": frozenset({"nms"}),
    "iou_threshold": frozenset({rpn.OVERLAP, model.OVERLAP}),
    "nms_pre": frozenset({rpn.BEST_OF_LEVEL, 2000}),
    "max_per_img": frozenset({rpn.BEST_OF_IMAGE, model.MOST}),
    "min_bbox_size": frozenset({0}),
    "score_thr": frozenset({model.MIN_SCORE}),
    "mask_thr_binary": frozenset({THRESHOLD}),
}


def configure_mask_rcnn(shapes: Mapping[str, tuple[int, ...]], *, original_first: bool) -> MaskRCNNConfig:
    """The configuration of a head with these shapes. CheckpointError for what is no such head."""

    def shape(key: str, dimensions: int) -> tuple[int, ...]:
        found = shapes.get(key)
        if found is None or len(found) != dimensions:
            problem = "is missing" if found is None else f"has the shape {found}"
            raise CheckpointError(f"not a head of Mask R-CNN: the weight {key} {problem}")
        return found

    def count(place: str) -> int:
        return len({key.split(".")[3] for key in shapes if key.startswith(f"roi_head.bbox_head.{place}.")})

    laterals = sum(key.startswith("neck.lateral_convs.") and key.endswith(".conv.weight") for key in shapes)
    if shape("rpn_head.rpn_cls.weight", 4)[0] != len(ANCHOR_RATIOS):
        raise CheckpointError(f"has other anchors than {len(ANCHOR_RATIOS)} for each place, which is not supported")
    classes, hidden = shape("roi_head.bbox_head.fc_cls.weight", 2)
    if shape("roi_head.bbox_head.fc_reg.weight", 2)[0] != 4 * (classes - 1):
        raise CheckpointError("has boxes that are not those of each class, which is not supported")
    try:
        return MaskRCNNConfig(
            in_channels=tuple(shape(f"neck.lateral_convs.{level}.conv.weight", 4)[1] for level in range(laterals)),
            channels=shape("neck.fpn_convs.0.conv.weight", 4)[0],
            hidden=hidden,
            num_classes=classes - 1,
            box_convs=count("shared_convs"),
            box_fcs=count("shared_fcs"),
            normed="neck.lateral_convs.0.bn.weight" in shapes,
            original_first=original_first,
        )
    except UsageError as error:
        raise CheckpointError(f"not a head of Mask R-CNN: {error.what}") from error
