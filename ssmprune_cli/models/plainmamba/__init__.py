"""PlainMamba: blocks of one width whose scans follow four snakes over the grid."""

from __future__ import annotations

from ssmprune_cli.models.plainmamba.adapter import (
    ADAPTER_COMPUTES,
    AdapterConfig,
    PlainMambaAdapter,
    configure_adapter,
)
from ssmprune_cli.models.plainmamba.checkpoint import PLAINMAMBA, configure_encoder
from ssmprune_cli.models.plainmamba.mixer import PlainMambaMixer
from ssmprune_cli.models.plainmamba.model import PlainMamba, PlainMambaConfig
from ssmprune_cli.models.plainmamba.routes import walks

__all__ = [
    "ADAPTER_COMPUTES",
    "PLAINMAMBA",
    "AdapterConfig",
    "PlainMamba",
    "PlainMambaAdapter",
    "PlainMambaConfig",
    "PlainMambaMixer",
    "configure_adapter",
    "configure_encoder",
    "walks",
]
