"""Sessions: a snapshot of a model that runs fast on one device, and says how."""

from __future__ import annotations

from ssmprune_cli.inference.explain import Explanation, Step
from ssmprune_cli.inference.prepare import prepare
from ssmprune_cli.inference.session import Session

__all__ = ["Explanation", "Session", "Step", "prepare"]
