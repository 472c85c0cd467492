"""A user's own module: its mixers are recognised and proven, computed by our ops, and pruned inside."""

from __future__ import annotations

from ssmprune_cli.adapt.accelerate import Acceleration, accelerate, restore
from ssmprune_cli.adapt.compress import Compressed, compress

__all__ = ["Acceleration", "Compressed", "accelerate", "compress", "restore"]
