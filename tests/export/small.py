"""Small models to export."""

from __future__ import annotations

from typing import Any

import torch

from ssmprune_cli.models import FAMILIES, Backbone
from ssmprune_cli.models.heads import UperNetConfig
from ssmprune_cli.models.vmamba import VMambaConfig
from ssmprune_cli.preprocessing import KeepRatio
from ssmprune_cli.pruning import compress

MAMBA: dict[str, Any] = {"image_size": 16, "patch_size": 4, "stride": 4, "embed_dim": 16, "depth": 2, "num_classes": 5}
PLAIN: dict[str, Any] = {"image_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_classes": 5, "d_conv": 3}
VMAMBA: dict[str, Any] = {"image_size": 16, "embed_dim": 8, "depths": (1, 2), "num_classes": 5}
EFFICIENT: dict[str, Any] = {**VMAMBA, "depths": (2, 1, 1, 1)}
VISION: dict[str, Any] = {"image_size": 64, "in_dim": 8, "embed_dim": 8, "depths": (1, 1, 3, 1), "num_classes": 5}
SIZES = {
    "plainmamba": PLAIN,
    "vmamba": VMAMBA,
    "localvmamba": VMAMBA,
    "efficientvmamba": EFFICIENT,
    "mambavision": VISION,
    "videomamba-clips": {**MAMBA, "num_frames": 2},
}


def make(family: str, reduction: str | None = None, **more: Any) -> Backbone:
    """A tiny model with random weights, dense or with half of its tokens dropped before the last block."""
    torch.manual_seed(0)
    known = FAMILIES.get(family)
    sizes = SIZES.get(family, MAMBA)
    model = known.build(known.config_class(**{**sizes, **more}))
    if reduction is not None:
        compress(model, 0.5, points=[2] if family in ("vmamba", "localvmamba") else [1], reduction=reduction)
    return model


def make_upernet() -> Backbone:
    torch.manual_seed(0)
    encoder = VMambaConfig((32, 32), embed_dim=8, depths=(1, 2), num_classes=0, out_stages=(0, 1))
    head = UperNetConfig(in_channels=encoder.map_channels, channels=6, num_classes=4, pool_scales=(1, 3))
    known = FAMILIES.get("vmamba-upernet")
    model = known.build(known.config_class(encoder=encoder, head=head, preprocessing=KeepRatio(128, 32)))
    compress(model, 0.5, points=[2], reduction="context")
    return model
