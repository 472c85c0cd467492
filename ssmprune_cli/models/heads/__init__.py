"""Heads of dense models: what makes pixels' classes, or boxes and masks, of feature maps. They know no backbone."""

from __future__ import annotations

from ssmprune_cli.models.heads.mask_rcnn import (
    MASK_RCNN_COMPUTES,
    Detections,
    MaskRCNN,
    MaskRCNNConfig,
    configure_mask_rcnn,
)
from ssmprune_cli.models.heads.upernet import UperNet, UperNetConfig, configure_upernet

__all__ = [
    "MASK_RCNN_COMPUTES",
    "Detections",
    "MaskRCNN",
    "MaskRCNNConfig",
    "UperNet",
    "UperNetConfig",
    "configure_mask_rcnn",
    "configure_upernet",
]
