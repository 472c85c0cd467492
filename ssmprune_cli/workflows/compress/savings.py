"""What dropping tokens and weights in eight bits save, apart and together."""

from __future__ import annotations

import copy
from typing import Any, Literal

from torch import nn

from ssmprune_cli.data import ImageDataset
from ssmprune_cli.inference import prepare
from ssmprune_cli.models import Backbone, set_layer
from ssmprune_cli.report import SavingFacts
from ssmprune_cli.statistics import ratio_of_medians
from ssmprune_cli.tasks import Task
from ssmprune_cli.workflows.evaluate import evaluate
from ssmprune_cli.workflows.measure import interleaved_speeds

Tokens = Literal["all", "pruned"]
Weights = Literal["float", "int8"]


def savings(
    dense: Backbone,
    model: Backbone,
    dataset: ImageDataset | None,
    *,
    task: Task[Any, Any],
    limit: int | None,
    batch_size: int,
    rounds: int,
    device: str,
) -> tuple[tuple[SavingFacts, ...], list[str]]:
    """Of `model`, which is made of `dense` and in eight bits, and of the same with its weights in float; and if it
    drops tokens, of both without its pruner. All are of its size: where that is the size of `dense`, it is the one
    with all tokens in float.

    All are timed in turns on a batch of images of their size, and judged on `dataset` as `task` does, if there is
    one. Beside these facts a warning, if weights in eight bits make the model slower.
    """
    in_float = copy.deepcopy(model)
    for name in model.layers_of(model.eight_bit_kinds):
        layer = dense.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        set_layer(in_float, name, copy.deepcopy(layer))
    whole = dense if model.config == dense.config else _without_pruner(in_float)
    models: dict[tuple[Tokens, Weights], Backbone] = {("all", "float"): whole, ("all", "int8"): _without_pruner(model)}
    if model.pruner is not None:
        models |= {("pruned", "float"): in_float, ("pruned", "int8"): model}
    target = next(model.parameters()).device
    images = [each.example(batch_size) for each in models.values()]
    sessions = [prepare(each, device=target) for each in models.values()]
    speeds = interleaved_speeds(sessions, images, rounds)
    found = []
    for ((tokens, weights), each), speed in zip(models.items(), speeds, strict=True):
        score = None
        if dataset is not None:
            score = task.estimate(evaluate(each, dataset, limit=limit, task=task, device=device).score).value
        size = stored_bytes(each)
        found.append(SavingFacts(tokens=tokens, weights=weights, bytes=size, median_ms=speed.median_ms, score=score))
    times = {key: speed.rounds_ms for key, speed in zip(models, speeds, strict=True)}
    own: Tokens = "all" if model.pruner is None else "pruned"
    ratio, (low, _) = ratio_of_medians(times[own, "float"], times[own, "int8"])
    warnings = []
    if low > 1:
        text = f"Weights in eight bits make a batch of {batch_size} slower here: {ratio:.2f} times the time."
        warnings.append(f"{text} They pay in wide layers.")
    return tuple(found), warnings


def _without_pruner(model: Backbone) -> Backbone:
    """The same layers, with all tokens."""
    unpruned = copy.copy(model)
    unpruned._modules = {**model._modules, "pruner": None}
    return unpruned


def stored_bytes(model: Backbone) -> int:
    """Of all that is saved of `model`: weights, and what its pruner holds."""
    return sum(value.numel() * value.element_size() for value in model.state_dict().values())
