"""Bytes that gathers, scatters, sorts and sums move: work that multiply-adds do not show.

Every tensor that such an op reads or writes counts once, wherever it lies. Of our own ops (`ops/`) those that order and
move tokens at a prune point count; what the others gather inside them is part of their time alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ssmprune_cli.models import Backbone
from ssmprune_cli.workflows.measure.every_op import EveryOp, op_name

MOVES = frozenset({"argmax", "argmin", "argsort", "cat", "cumsum", "gather", "index", "index_add", "index_copy"}) | {
    *(
        "index_put",
        "index_put_",
        "index_select",
        "move_tokens",
        "order_tokens",
        "scatter",
        "scatter_",
        "scatter_add",
        "scatter_add_",
    ),
    *("scatter_reduce", "searchsorted", "sort", "sum", "topk"),
}


class _Traffic(EveryOp):
    def __init__(self) -> None:
        super().__init__()
        self.count: int = 0

    def around(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        if op_name(func) in MOVES:
            self.count += sum(each.numel() * each.element_size() for each in _tensors((args, kwargs, result)))
        return result


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _tensors(each)


def bytes_moved(model: Backbone) -> int:
    """Of one image through `model` op by op, its pruner included."""
    images = model.example(1)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    traffic = _Traffic()
    with torch.inference_mode(), traffic:
        model(images)
    for module, mode in modes.items():
        module.training = mode
    return traffic.count
