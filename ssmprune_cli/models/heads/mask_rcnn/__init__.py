"""Mask R-CNN: boxes, classes and masks of objects, from the feature maps of an encoder that it knows nothing of."""

from __future__ import annotations

from ssmprune_cli.models.heads.mask_rcnn.checkpoint import MASK_RCNN_COMPUTES, configure_mask_rcnn
from ssmprune_cli.models.heads.mask_rcnn.detections import Detections
from ssmprune_cli.models.heads.mask_rcnn.model import MaskRCNN, MaskRCNNConfig

__all__ = ["MASK_RCNN_COMPUTES", "Detections", "MaskRCNN", "MaskRCNNConfig", "configure_mask_rcnn"]
