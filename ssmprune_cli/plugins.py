"""What installed packages add: entry points of the group `ssmprune.families`, by name. Nothing of a package is imported
until it is loaded, so that `--help` does not wait for it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

GROUP = "ssmprune.families"


class PluginWarning(UserWarning):
    """A package claims to add something, and does not."""


@dataclass(frozen=True)
class Plugin:
    """An entry point: `name` of what it adds, the `package` that does, with its version, and how that is imported."""

    name: str
    package: str
    load: Callable[[], Any]

    def warn(self, problem: str) -> None:
        """Say that what this adds is left out, and why."""
        warnings.warn(
            f"the model family {self.name!r} of the installed package {self.package} is left out: {problem}",
            PluginWarning,
            stacklevel=2,
        )


@cache
def family_plugins() -> tuple[Plugin, ...]:
    """The families that installed packages add, in the order of package and name: the first of two with one name goes
    first wherever the packages lie."""
    from importlib import metadata

    found = []
    for entry in metadata.entry_points(group=GROUP):
        assert entry.dist is not None  # of what is installed
        found.append(Plugin(entry.name, f"{entry.dist.name} {entry.dist.version}", entry.load))
    return tuple(sorted(found, key=lambda plugin: (plugin.package, plugin.name)))
