"""From "my_pkg.models:build" to a module. It imports and runs the user's code, and says what goes wrong in it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ssmprune_cli.errors import CheckpointError, SsmpruneError, UsageError, listing, shown
from ssmprune_cli.models import Backbone

_OPTION = "--module"
_WANTED = (
    "Give PACKAGE:FUNCTION, such as `--module my_pkg.models:build`: the function takes nothing and returns the module."
)


def build(name: str) -> nn.Module:
    """The module that the function called `name` returns, in evaluation mode. Modules are looked for in the current
    folder too, as `python -m` does.

    Raises UsageError for a name that leads to no function, or to one that returns something else than a module of the
    user's; SsmpruneError if the function fails.
    """
    function = _function(name)
    try:
        built = function()
    except (Exception, SystemExit) as error:
        raise SsmpruneError(
            f"the function fails: {_said(error)}",
            where=f"{_OPTION} {name}",
            hint="It is called without arguments. `ssmprune --debug ...` shows where it fails.",
        ) from error
    if not isinstance(built, nn.Module):
        raise UsageError(
            f"returns a value of type {type(built).__name__}, not an nn.Module",
            where=f"{_OPTION} {name}",
            hint=_WANTED,
        )
    if isinstance(built, Backbone):
        raise UsageError(
            f"returns a {type(built).__name__}, a model of ours", where=_OPTION, hint="Leave out `--module`."
        )
    if not any(True for _ in built.parameters()):
        raise UsageError("returns a module without weights", where=f"{_OPTION} {name}")
    if any(each.is_meta for each in (*built.parameters(), *built.buffers())):
        raise UsageError(
            "returns a module on the meta device, into which no weights can be loaded",
            where=f"{_OPTION} {name}",
            hint="Let the function build it on the CPU.",
        )
    return built.eval()


def check_name(name: str) -> tuple[str, str]:
    """The package and the function in "PACKAGE:FUNCTION". UsageError for what is not of this form."""
    place, _, attribute = name.partition(":")
    if not all(each.isidentifier() for each in (*place.split("."), *attribute.split("."))):
        raise UsageError(f"{shown(name)!r} names no function", where=_OPTION, hint=_WANTED)
    return place, attribute


def _function(name: str) -> Any:
    place, attribute = check_name(name)
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(place)
    except (Exception, SystemExit) as error:
        raise UsageError(
            f"{place} cannot be imported: {_said(error)}",
            where=f"{_OPTION} {name}",
            hint="Install it beside ssmprune, or run in the folder that it lies in.",
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise UsageError(f"there is no {part} in {place}", where=f"{_OPTION} {name}", hint=_WANTED)
        found = getattr(found, part)
    if not callable(found) or isinstance(found, nn.Module):
        raise UsageError(
            f"is a value of type {type(found).__name__}, which is no function", where=f"{_OPTION} {name}", hint=_WANTED
        )
    return found


def fill(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Load `state` into `model`, all of it and nothing else. CheckpointError, naming keys, for what does not fit.

    A prefix that all keys of the module share, such as `model.`, may be missing: checkpoints are read without.
    """
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    found = next((each for each in _prefixed(state, shapes) if set(each) == set(shapes)), state)
    missing, unknown = sorted(set(shapes) - set(found)), sorted(set(found) - set(shapes))
    other = [
        f"{name} ({tuple(value.shape)} in the file, {shapes[name]} in the module)"
        for name, value in found.items()
        if name in shapes and tuple(value.shape) != shapes[name]
    ]
    faults = [("missing", missing), ("not of the module", unknown), ("of another shape", other)]
    said = [f"{words}: {listing(names)}" for words, names in faults if names]
    if said:
        raise CheckpointError(
            f"the weights do not fit the module that `--module` builds; {'; '.join(said)}",
            where=where,
            hint="Let the function build the module with the sizes that were trained.",
        )
    try:
        model.load_state_dict(dict(found))
    except RuntimeError as error:
        raise CheckpointError(f"the weights do not fit the module: {error}", where=where) from error


def _prefixed(state: Mapping[str, Tensor], names: Mapping[str, Any]) -> list[Mapping[str, Tensor]]:
    """`state` as it is, and with each prefix that all `names` share."""
    first = min(names).split(".")[:-1]
    prefixes = [".".join(first[:count]) + "." for count in range(1, len(first) + 1)]
    shared = [prefix for prefix in prefixes if all(name.startswith(prefix) for name in names)]
    return [state, *({prefix + name: value for name, value in state.items()} for prefix in shared)]


def _said(error: BaseException) -> str:
    first = str(error).strip().split("\n")[0][:300]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
