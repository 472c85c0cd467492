"""Mask R-CNN: boxes, classes and masks of objects, from the feature maps of an encoder that it knows nothing of."""

from __future__ import annotations

from ssmprune_cli.models.heads.mask_rcnn.detections import Detections
from ssmprune_cli.models.heads.mask_rcnn.model import MaskRCNN, MaskRCNNConfig

__all__ = ["Detections", "MaskRCNN", "MaskRCNNConfig"]
