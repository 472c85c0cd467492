"""Model families that installed packages add. Whatever is wrong with one, the others stay usable."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import is_dataclass, replace
from typing import Any

from ssmprune_cli.errors import CheckpointError, SsmpruneError
from ssmprune_cli.models.common import Family, Hints, ImageConfig, Shapes
from ssmprune_cli.plugins import Plugin, family_plugins
from ssmprune_cli.registry import Registry

_NAME = re.compile(r"[a-z][a-z0-9_-]*")


def add_plugins(families: Registry[Family]) -> None:
    """Register what installed packages add to `families`; a PluginWarning for each that cannot be."""
    for plugin in family_plugins():
        try:
            family = plugin.load()
        except (Exception, SystemExit) as error:  # whatever a package does when it is imported
            plugin.warn(f"it cannot be imported ({type(error).__name__}: {error})")
            continue
        problem = _problem(plugin.name, family, families)
        if problem:
            plugin.warn(problem)
        else:
            families.register(plugin.name, _guarded(family, plugin))


def _problem(name: str, family: Any, families: Registry[Family]) -> str | None:
    """Why `family` cannot be registered under `name`; None if it can."""
    if not isinstance(family, Family):
        return f"the entry point is a {type(family).__name__}, and not a Family record"
    if not _NAME.fullmatch(name):
        return "a name is lower-case letters, digits, - and _, and begins with a letter"
    if name in families:
        return "the name is taken"
    if family.name != name:
        return f"its record has another name, {family.name!r}"
    config: Any = family.config_class
    if not (isinstance(config, type) and issubclass(config, ImageConfig) and is_dataclass(config)):
        return "its config_class is no dataclass of ImageConfig's kind"
    variants = family.variants
    if not (isinstance(variants, dict) and all(isinstance(each, config) for each in variants.values())):
        return "its variants are no dict of configurations, each of its config_class"
    taken = {variant for _, known in families.items() for variant in known.variants}
    doubles = sorted(taken.intersection(variants))
    return f"the variant {doubles[0]} is another family's" if doubles else None


def _guarded(family: Family, plugin: Plugin) -> Family:
    """`family`, whose own errors name the package. One that cannot say whether a file is its own is asked no more."""

    def matches(shapes: Shapes, hints: Hints) -> bool:
        try:
            return bool(family.matches(dict(shapes), hints))  # its own: the families after it are asked with these
        except Exception as error:
            plugin.warn(f"it cannot tell whether a file is its own ({type(error).__name__}: {error})")
            return False

    def guarded(name: str) -> Callable[..., Any]:
        step = getattr(family, name)

        @functools.wraps(step)
        def run(*inputs: Any) -> Any:
            try:
                return step(*inputs)
            except SsmpruneError:
                raise
            except Exception as error:
                problem = f"`{name}` of the installed package {plugin.package} failed: {type(error).__name__}: {error}"
                raise CheckpointError(problem, hint="Report it to the package's authors.") from error

        return run

    steps: dict[str, Any] = {name: guarded(name) for name in ("configure", "build", "remap", "resize", "fills")}
    return replace(family, matches=matches, **steps)
