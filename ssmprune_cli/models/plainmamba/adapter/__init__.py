"""PlainMamba with the adapter that makes maps of four scales for detectors."""

from __future__ import annotations

from ssmprune_cli.models.plainmamba.adapter.model import AdapterConfig, PlainMambaAdapter

__all__ = ["AdapterConfig", "PlainMambaAdapter"]
