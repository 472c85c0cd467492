"""Weights in eight bits: which kinds of linear layers bear it, measured on the calibration images.

Of each kind of layer in the blocks (`in_proj`, `out_proj`, `x_proj`, `fc1` ...) only its own weights are put into eight
bits, and the answers are compared with those in float. Kinds, not single layers, so that blocks stay alike and run in
one call. Kinds that harm most stay in float, until all the others together diverge by no more than MOST.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ssmprune_cli.errors import DataError, UsageError
from ssmprune_cli.inference import prepare
from ssmprune_cli.kernels import pick
from ssmprune_cli.models import Backbone, put_in_eight_bits, set_layer
from ssmprune_cli.report import EightBitFacts, LayerKind
from ssmprune_cli.tasks import TASKS
from ssmprune_cli.workflows.trials import run

MOST = 0.01  # mean divergence from the same model in float, in the task's unit
_TOGETHER = ("in_proj", "out_proj")  # in float or in eight bits: a block is one call with both in one form


@dataclass(frozen=True)
class EightBits:
    """What became of each kind of layer, and the mean divergence of all that are in eight bits."""

    kinds: tuple[LayerKind, ...]
    images: int
    divergence: float | None
    warnings: tuple[str, ...] = ()

    @property
    def chosen(self) -> tuple[str, ...]:
        return tuple(each.kind for each in self.kinds if each.eight_bits)

    def facts(self) -> EightBitFacts:
        """Without the models, which are not measured yet."""
        return EightBitFacts(kinds=self.kinds, images=self.images, divergence=self.divergence, models=())


def refuse_eight_bits(model: Backbone) -> None:
    """UsageError for a model that is in eight bits."""
    if model.eight_bit_kinds:
        raise UsageError(
            f"the weights of {', '.join(model.eight_bit_kinds)} are in eight bits already",
            hint="Load the checkpoint that this model was made of.",
        )


def to_eight_bits(model: Backbone, batches: Iterable[Tensor] | None, kinds: Sequence[str] | None = None) -> EightBits:
    """Put weights of `model` into eight bits, in place: of these `kinds` of layers, or of those that bear it.

    batches  calibration images (B, 3, H, W); None measures nothing, and takes every kind if none are named

    Raises UsageError for a kind that the model does not have and for one in eight bits already; DataError if there are
    no images, or the answers to them are not finite. A model of which no kind bears it stays as it is, with a warning.
    """
    refuse_eight_bits(model)
    known = model.linear_kinds
    left = list(known if kinds is None else dict.fromkeys(kinds))
    model.layers_of(left)  # refuses those that the model does not have, before anything is measured
    warnings = _slow(model)
    if batches is None:
        if kinds is None:
            warnings.append(
                "No calibration images were given, so no layer's harm was measured: all kinds are in eight bits."
            )
        put_in_eight_bits(model, model.layers_of(left))
        return EightBits(_table(known, left, {}), 0, None, tuple(warnings))
    measure = _Measure(model, list(batches))
    alone: dict[str, float] = {}
    for group in _groups(known):
        alone |= dict.fromkeys(group, measure(group))
    together = measure(left)
    while kinds is None and left and together > MOST:
        worst = max(left, key=lambda kind: alone[kind])
        left = [each for each in left if alone[each] < alone[worst]]
        together = measure(left)
    put_in_eight_bits(model, model.layers_of(left))
    if not left:
        warnings.append(
            f"All weights stay in float: with any kind of layer in eight bits the answers diverge by more than {MOST}."
        )
    return EightBits(_table(known, left, alone), measure.images, together, tuple(warnings))


def _table(
    known: Mapping[str, Sequence[str]], chosen: Sequence[str], alone: Mapping[str, float]
) -> tuple[LayerKind, ...]:
    return tuple(
        LayerKind(
            kind=kind,
            layers=len(names),
            eight_bits=kind in chosen,
            divergence=alone[kind] if math.isfinite(alone.get(kind, math.inf)) else None,
        )
        for kind, names in known.items()
    )


class _Measure:
    """Mean divergence of the model with some kinds of layers in eight bits, from the same model in float."""

    def __init__(self, model: Backbone, batches: list[Tensor]) -> None:
        if not batches:
            raise DataError("there are no images to measure eight bits on")
        self._model, self._batches, self._task = model, batches, TASKS.get(model.task)
        self._expected = run(prepare(model), batches)
        self.images = sum(len(batch) for batch in batches)
        if not self._expected.isfinite().all():
            raise DataError(
                "the model's answers to the calibration images are not finite, so nothing can be measured on them",
                hint="`ssmprune inspect` shows whether the weights are finite.",
            )

    def __call__(self, kinds: Sequence[str]) -> float:
        if not kinds:
            return 0.0
        before = put_in_eight_bits(self._model, self._model.layers_of(kinds))
        try:
            found = run(prepare(self._model), self._batches)
        finally:
            for name, layer in before.items():
                set_layer(self._model, name, layer)
        mean = float(self._task.divergence(self._expected, found).mean())
        return mean if math.isfinite(mean) else math.inf


def _groups(kinds: Iterable[str]) -> list[tuple[str, ...]]:
    both = tuple(each for each in kinds if each in _TOGETHER)
    return [*([both] if both else []), *((each,) for each in kinds if each not in _TOGETHER)]


def _slow(model: Backbone) -> list[str]:
    """A warning where products of bytes have no instruction of their own."""
    device = next(model.parameters()).device
    if pick(torch.empty(0, device=device), 1).has_dots():
        return []
    return [f"This {device} has no instruction for products of eight bits: they may be slower than those in float."]
