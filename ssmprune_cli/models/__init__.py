"""Model families by name. A family registers here in one line; see `base.Family`."""

from __future__ import annotations

from ssmprune_cli.models.base import Backbone, Family
from ssmprune_cli.models.mambar import MAMBA_REG
from ssmprune_cli.models.plainmamba_checkpoint import PLAINMAMBA
from ssmprune_cli.models.videomamba import VIDEOMAMBA
from ssmprune_cli.models.vim_checkpoint import VIM
from ssmprune_cli.models.vmamba_checkpoint import VMAMBA
from ssmprune_cli.registry import Registry

FAMILIES: Registry[Family] = Registry("model family")
FAMILIES.register(VIM.name, VIM)
FAMILIES.register(VIDEOMAMBA.name, VIDEOMAMBA)
FAMILIES.register(MAMBA_REG.name, MAMBA_REG)
FAMILIES.register(PLAINMAMBA.name, PLAINMAMBA)
FAMILIES.register(VMAMBA.name, VMAMBA)

__all__ = ["FAMILIES", "Backbone", "Family"]
