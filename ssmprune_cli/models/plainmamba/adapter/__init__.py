"""PlainMamba with the adapter that makes maps of four scales for detectors."""

from __future__ import annotations

from ssmprune_cli.models.plainmamba.adapter.checkpoint import ADAPTER_COMPUTES, configure_adapter
from ssmprune_cli.models.plainmamba.adapter.model import STRIDE, AdapterConfig, PlainMambaAdapter

__all__ = ["ADAPTER_COMPUTES", "STRIDE", "AdapterConfig", "PlainMambaAdapter", "configure_adapter"]
