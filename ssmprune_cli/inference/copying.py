"""Copies of a module tree that share its tensors, and of what a module computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)
Changes = Mapping[nn.Module, Callable[[nn.Module], nn.Module]]


def shallow(module: M) -> M:
    """A module with the same parts, whose slots can be filled without changing those of `module`."""
    return as_kind(module, type(module))


def as_kind(module: nn.Module, kind: type[M], **attributes: object) -> M:
    """`shallow`, as a module of `kind`, a subclass of its own, with `attributes` besides."""
    copied = kind.__new__(kind)
    copied.__dict__.update(module.__dict__)
    for table in ("_parameters", "_buffers", "_modules"):
        copied.__dict__[table] = dict(module.__dict__[table])
    copied.__dict__.update(attributes)
    return copied


def with_changes(module: nn.Module, changes: Changes, done: dict[nn.Module, nn.Module] | None = None) -> nn.Module:
    """`module` in new modules that share its tensors; what is in `changes` is made by that of its own copy, whose
    children are made already. A module that is in several places is made once."""
    done = {} if done is None else done
    if module not in done:
        copied = shallow(module)
        for name, child in module._modules.items():
            copied._modules[name] = None if child is None else with_changes(child, changes, done)
        done[module] = changes[module](copied) if module in changes else copied
    return done[module]


def cloned(outputs: Any) -> Any:
    """A copy of what a model computes: a tensor, or a tuple of them."""
    return tuple(map(cloned, outputs)) if isinstance(outputs, tuple) else outputs.clone()
