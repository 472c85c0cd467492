"""Heads of dense models: what makes pixels' classes, or boxes and masks, of feature maps. They know no backbone."""

from __future__ import annotations

from ssmprune_cli.models.heads.upernet import UperNet, UperNetConfig, configure_upernet

__all__ = ["UperNet", "UperNetConfig", "configure_upernet"]
