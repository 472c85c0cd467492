"""Model families by name. A family registers here in one line; see `base.Family`."""

from __future__ import annotations

from ssmprune_cli.models.common import (
    Backbone,
    Family,
    Hints,
    Shapes,
    blocks,
    kept_tensors,
    set_drop_path,
    set_recompute,
)
from ssmprune_cli.models.mamba import MAMBA_REG, VIDEOMAMBA, VIM
from ssmprune_cli.models.plainmamba import PLAINMAMBA
from ssmprune_cli.models.vmamba import VMAMBA
from ssmprune_cli.registry import Registry

FAMILIES: Registry[Family] = Registry("model family")
FAMILIES.register(VIM.name, VIM)
FAMILIES.register(VIDEOMAMBA.name, VIDEOMAMBA)
FAMILIES.register(MAMBA_REG.name, MAMBA_REG)
FAMILIES.register(PLAINMAMBA.name, PLAINMAMBA)
FAMILIES.register(VMAMBA.name, VMAMBA)

__all__ = [
    "FAMILIES",
    "Backbone",
    "Family",
    "Hints",
    "Shapes",
    "blocks",
    "kept_tensors",
    "set_drop_path",
    "set_recompute",
]
