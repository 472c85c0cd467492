"""A machine without noise, on which searches are timed: how long a model takes is counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ssmprune_cli.inference import Session
    from ssmprune_cli.models import Backbone
    from ssmprune_cli.workflows.measure import Speed

_known: dict[object, float] = {}


def milliseconds(model: Backbone) -> float:
    """A fifth of a millisecond, and one for every ten million multiply-adds, or every twenty of a model with weights in
    eight bits."""
    from ssmprune_cli.workflows.measure import count_flops

    key = (model.family, model.config, getattr(model.pruner, "settings", None), model.eight_bit_kinds)
    if key not in _known:
        _known[key] = 0.2 + count_flops(model).all_directions / (2e7 if model.eight_bit_kinds else 1e7)
    return _known[key]


def speeds(sessions: list[Session], images: torch.Tensor, rounds: int, **_: int) -> list[Speed]:
    """In the place of `interleaved_speeds`."""
    from ssmprune_cli.models import Backbone
    from ssmprune_cli.workflows.measure import Speed

    times = [milliseconds(each.definition) for each in sessions if isinstance(each.definition, Backbone)]
    return [Speed(time, (time, time), 1.0, rounds, (time,) * rounds) for time in times]


def install(put: Callable[[object, str, object], None]) -> None:
    """Have searches timed so, and without tables of earlier runs. `put` is setattr, or undoes it at the end."""
    from ssmprune_cli.workflows.trials import clock

    put(clock, "interleaved_speeds", speeds)
    put(clock, "cache_folders", list)
