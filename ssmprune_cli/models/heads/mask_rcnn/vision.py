"""torchvision's operators, where they can be had: its release must be the one made for the torch that is installed."""

from __future__ import annotations

from functools import cache
from typing import Any


@cache
def torchvision_ops() -> Any | None:
    """The module `torchvision.ops`; None where torchvision is not installed or was built for another torch."""
    try:
        from torchvision import ops
    except (ImportError, RuntimeError, OSError):  # the last two: its compiled part does not fit
        return None
    return ops
