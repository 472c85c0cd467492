"""Heads of dense models: what makes pixels' classes, or boxes and masks, of feature maps. They know no backbone."""

from __future__ import annotations

from ssmprune_cli.models.heads.mask_rcnn import Detections, MaskRCNN, MaskRCNNConfig
from ssmprune_cli.models.heads.upernet import UperNet, UperNetConfig, configure_upernet

__all__ = ["Detections", "MaskRCNN", "MaskRCNNConfig", "UperNet", "UperNetConfig", "configure_upernet"]
