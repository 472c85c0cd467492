"""Whether a module does what its class says, and nothing besides: what a fused call that skips it relies on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FunctionType

from torch import nn
from torch.nn.modules import module as torch_module

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def unlike(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Why `module` may do something else than a `kind` when it is called; None if it cannot."""
    if type(module) is not kind:
        return f"a {type(module).__name__} in the place of a {kind.__name__}"
    if any(getattr(module, hooks) for hooks in _HOOKS):
        return f"a {kind.__name__} has hooks"
    methods = [name for name in vars(module) if callable(getattr(kind, name, None))]
    if methods:
        return f"a {kind.__name__} has its own {methods[0]}"
    replaced = next(_replaced(kind), None)
    return f"{replaced} has been replaced" if replaced else None


def _replaced(kind: type[nn.Module]) -> Iterator[str]:
    """Methods that somebody has put into `kind` or a class that it is made from: their code is of another file."""
    for owner in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        file = getattr(sys.modules.get(owner.__module__), "__file__", None)
        for name, value in vars(owner).items():
            function = getattr(value, "__func__", value)  # of a class or static method
            if isinstance(function, FunctionType):
                foreign = file is not None and function.__code__.co_filename != file
                if foreign and (not name.startswith("__") or name == "__call__"):
                    yield f"{owner.__name__}.{name}"
            elif name == "forward":
                yield f"{owner.__name__}.{name}"


def first_unlike(*parts: tuple[nn.Module, type[nn.Module]]) -> str | None:
    """The first reason of `unlike`."""
    return next((reason for module, kind in parts if (reason := unlike(module, kind))), None)


def global_hooks() -> bool:
    """Whether hooks are registered that torch calls around every module."""
    return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)


def foreign_methods(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Names of modules, and of methods that stand in their instance in the place of their class's, unless these are
    methods of a module of `model` too: others may hold on to a module, and a copy of `model` would call that one."""
    inside = set(model.modules())
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            replaces = callable(value) and callable(getattr(type(module), attribute, None))
            if replaces and getattr(value, "__self__", None) not in inside:
                yield name or type(model).__name__, attribute
