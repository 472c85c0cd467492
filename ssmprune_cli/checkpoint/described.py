"""Models without their weights, from plain values: the family, its configuration, and how it is pruned."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ssmprune_cli import pruning
from ssmprune_cli.errors import CheckpointError, UsageError, listing
from ssmprune_cli.models import (
    FAMILIES,
    MAX_CUT,
    Backbone,
    Family,
    blocks_cut,
    dense_config,
    make_room_for_eight_bits,
)

MAX_NUMBER = 1 << 20  # in a configuration; nothing in a model of this kind is wider or longer
_DRAWN = (Tensor.normal_, Tensor.uniform_, nn.init.normal_)
_MOST_WEIGHTS = 1 << 14  # tensors of a model that nothing but a description limits


def described(
    family: str,
    config: Mapping[str, Any],
    settings: Mapping[str, Any] | None,
    path: Path,
    eight_bits: Sequence[str] = (),
) -> Backbone:
    """The model of this configuration, all of whose weights are 0, pruned as `settings` say, and the kinds of layers
    `eight_bits` in eight bits: to count with, and not to ask. `path` is the file that says so, and that holds the
    weights in a form of its own.

    Raises UsageError for an unknown family, CheckpointError for values that no model has, or none in such a file.
    """
    known = FAMILIES.get(family)
    model = unfilled(known, configuration(known, dict(config), _MOST_WEIGHTS, str(path)), settings, path, eight_bits)
    count, size = model.parameter_count, path.stat().st_size
    if count > 2 * size:  # a weight has a byte at least, unless several are one
        raise CheckpointError(f"says that it has {count:,} weights, and has {size:,} bytes", where=str(path))
    zeros = {name: torch.zeros(each.shape, dtype=each.dtype) for name, each in model.state_dict().items()}
    model.load_state_dict(zeros, assign=True)
    return model.eval().requires_grad_(False)


class _NothingDrawn(TorchFunctionMode):
    """As a context manager: layers leave their weights as they are. Random numbers without memory to hold them would
    have PyTorch import its compiler, for a second."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        return (*args, *named.values())[0] if func in _DRAWN else func(*args, **named)


def unfilled(
    family: Family, config: Any, settings: Mapping[str, Any] | None, path: Path, eight_bits: Sequence[str] = ()
) -> Backbone:
    """The backbone on the meta device, with a pruner if there are settings, and the kinds of layers `eight_bits` in
    eight bits."""
    try:
        with torch.device("meta"), _NothingDrawn():
            model = family.build(config)
            make_room_for_eight_bits(model, model.layers_of(dict.fromkeys(eight_bits)))
            if settings is not None:
                pruning.attach(model, settings)
    except (UsageError, RuntimeError, OverflowError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"no model can be built of these sizes: {error}", where=str(path)) from error
    return model


def configuration(family: Family, values: dict[str, Any], weights: int, where: str) -> Any:
    """The configuration in a config.json, of types and sizes that a model of so many `weights` can have."""
    unknown = sorted(set(values) - {field.name for field in fields(family.config_class)})
    if unknown:
        raise CheckpointError(f"the configuration is not valid: {listing(unknown)} is unknown", where=where)
    _check_numbers(values, weights, where)
    try:
        config = TypeAdapter(family.config_class).validate_json(json.dumps(values), strict=True)
        before, _ = dense_config(config), blocks_cut(config)  # raises where there can be no such dense model
        if config.cut_from is not None:  # what it says of that model is checked as it is said of this one
            configuration(family, asdict(before), weights + MAX_CUT, where)
        return config
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        raise CheckpointError(f"the configuration is not valid: {listing(faults)}", where=where) from error
    except (ValueError, TypeError, RecursionError, UsageError) as error:
        raise CheckpointError(f"the configuration is not valid: {error}", where=where) from error


def _check_numbers(values: dict[str, Any], weights: int, where: str) -> None:
    """CheckpointError unless a model of so many `weights` can have these sizes."""
    waiting = list(values.items())
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.items()
            continue
        numbers = [number for number in (value if isinstance(value, list) else [value]) if isinstance(number, int)]
        limit = weights if name in ("depth", "depths") else MAX_NUMBER
        most = MAX_NUMBER if name == "class_names" else weights + 2
        if sum(map(abs, numbers)) > limit or (isinstance(value, list) and len(value) > most):
            raise CheckpointError(
                f"the configuration is not valid: {name} is larger than {weights} weights can be", where=where
            )
