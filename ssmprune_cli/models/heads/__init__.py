"""What reads the feature maps of an encoder: heads, each in a room that knows no encoder."""

from __future__ import annotations

from ssmprune_cli.models.heads.mask_rcnn import Detections, MaskRCNN, MaskRCNNConfig

__all__ = ["Detections", "MaskRCNN", "MaskRCNNConfig"]
