"""Models out of Python and into it: folders like those of `compress`, and repositories of the hub that hold one."""

from __future__ import annotations

from ssmprune_cli.workflows.sharing.hub import from_pretrained, push_to_hub, save_pretrained
from ssmprune_cli.workflows.sharing.saving import save

__all__ = ["from_pretrained", "push_to_hub", "save", "save_pretrained"]
