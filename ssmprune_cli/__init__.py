"""ssmprune: make pretrained vision state space models cheaper by dropping tokens.

The verbs are imported when they are first used, so that `import ssmprune_cli` needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssmprune_cli.adapt import Adapter, accelerate
    from ssmprune_cli.checkpoint import load
    from ssmprune_cli.inference import prepare
    from ssmprune_cli.models import resize
    from ssmprune_cli.workflows.sharing import from_pretrained, push_to_hub, save, save_pretrained
    from ssmprune_cli.workflows.verbs import compress, repair, restore

__version__ = "0.2.0"
__all__ = [
    "Adapter",
    "__version__",
    "accelerate",
    "compress",
    "from_pretrained",
    "load",
    "prepare",
    "push_to_hub",
    "repair",
    "resize",
    "restore",
    "save",
    "save_pretrained",
]

_HOMES = {
    "Adapter": "ssmprune_cli.adapt",
    "accelerate": "ssmprune_cli.adapt",
    "load": "ssmprune_cli.checkpoint",
    "compress": "ssmprune_cli.workflows.verbs",
    "from_pretrained": "ssmprune_cli.workflows.sharing",
    "prepare": "ssmprune_cli.inference",
    "push_to_hub": "ssmprune_cli.workflows.sharing",
    "repair": "ssmprune_cli.workflows.verbs",
    "resize": "ssmprune_cli.models",
    "restore": "ssmprune_cli.workflows.verbs",
    "save": "ssmprune_cli.workflows.sharing",
    "save_pretrained": "ssmprune_cli.workflows.sharing",
}


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
