"""Dense models: a backbone of a known family as encoder, and a head that answers for every pixel or object."""

from __future__ import annotations

from ssmprune_cli.models.dense.detector import Detector
from ssmprune_cli.models.dense.mask_rcnn import PLAINMAMBA_MASK_RCNN, VMAMBA_MASK_RCNN
from ssmprune_cli.models.dense.model import DenseConfig, DenseModel
from ssmprune_cli.models.dense.segmenter import Segmenter
from ssmprune_cli.models.dense.upernet import PLAINMAMBA_UPERNET, VMAMBA_UPERNET

__all__ = [
    "PLAINMAMBA_MASK_RCNN",
    "PLAINMAMBA_UPERNET",
    "VMAMBA_MASK_RCNN",
    "VMAMBA_UPERNET",
    "DenseConfig",
    "DenseModel",
    "Detector",
    "Segmenter",
]
