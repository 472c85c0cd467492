"""Dense models: a backbone of a known family as encoder, and a head that answers for every pixel or object."""

from __future__ import annotations

from ssmprune_cli.models.dense.model import DenseConfig, DenseModel
from ssmprune_cli.models.dense.segmenter import Segmenter
from ssmprune_cli.models.dense.upernet import PLAINMAMBA_UPERNET, VMAMBA_UPERNET

__all__ = [
    "PLAINMAMBA_UPERNET",
    "VMAMBA_UPERNET",
    "DenseConfig",
    "DenseModel",
    "Segmenter",
]
