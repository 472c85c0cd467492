"""A user's own module: its mixers are recognised and proven, computed by our ops, and pruned inside."""

from __future__ import annotations

from ssmprune_cli.adapt.accelerating import Acceleration, accelerate, restore
from ssmprune_cli.adapt.adapter import Adapter
from ssmprune_cli.adapt.batches import answer_of
from ssmprune_cli.adapt.inside import compress
from ssmprune_cli.adapt.mixers import Seen, mixers_in
from ssmprune_cli.adapt.request import Compressed
from ssmprune_cli.adapt.sketch import sketch
from ssmprune_cli.adapt.stored import Inside, put_back, stored

__all__ = [
    "Acceleration",
    "Adapter",
    "Compressed",
    "Inside",
    "Seen",
    "accelerate",
    "answer_of",
    "compress",
    "mixers_in",
    "put_back",
    "restore",
    "sketch",
    "stored",
]
