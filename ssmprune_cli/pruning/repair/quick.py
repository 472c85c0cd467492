"""What a repair will about make of a candidate, in a fraction of a second and on few images: for a search, which judges
hundreds. Every image is answered by a head that was fitted to the others, so that what a fit learnt by heart does not
count."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ssmprune_cli.errors import UsageError
from ssmprune_cli.pruning.calibration import Prunable
from ssmprune_cli.pruning.divergence import divergence
from ssmprune_cli.pruning.pruner import TokenPruner
from ssmprune_cli.pruning.repair.features import Features, Runner, collect
from ssmprune_cli.pruning.repair.fit import Fit, Ridge

_FOLDS = 3
_STEPS = 20
_HEAD = (0.1, 0.01)  # ridges of the head's weights, the best of which the side features are added to
_SIDE = (0.3, 0.03)


def is_repairable(model: Prunable) -> bool:
    """Whether its head is one that a repair can fit: a linear layer with a bias."""
    try:
        layer: object = model.output_layer
    except UsageError:
        return False
    return isinstance(layer, nn.Linear) and layer.bias is not None


def quick_answers(
    model: Prunable, pruner: TokenPruner | None, batches: Iterable[Tensor], runner: Runner, dense: Tensor, *, side: bool
) -> Tensor:
    """Logits (n, classes) of `model` with `pruner`, repaired, or as they are if that is no nearer to `dense`
    (n, classes); both float64 on the CPU. Nothing is changed.

    batches  of images (B, 3, H, W), n in all
    runner   runs the model with another pruner
    side     whether the repair may have side features
    """
    weight = model.output_layer.weight.detach().double().cpu()
    bias = model.output_layer.bias.detach().double().cpu()
    features = collect(pruner, len(model.mixers) - 1, weight.shape[1], batches, runner, dense)
    plain = features.pooled @ weight.T + bias
    if not bool(features.pooled.isfinite().all() and features.side.isfinite().all()):
        return plain

    def best(parts: Features, ridges: Iterable[Ridge]) -> tuple[float, Ridge, Tensor]:
        fits = [_Fold(parts, weight, bias, fold) for fold in range(_FOLDS)]
        found = []
        for ridge in ridges:
            logits = torch.empty_like(plain)
            for fit in fits:
                logits[fit.held] = fit.logits(ridge)
            found.append((float(divergence(dense, logits).mean()), ridge, logits))
        return min(found, key=lambda choice: choice[0])

    value, ridge, logits = best(features.without_side(), [Ridge(head, 1.0) for head in _HEAD])
    if side and features.side.shape[1]:
        with_side = best(features, [Ridge(ridge.head, each) for each in _SIDE])
        value, _, logits = min((value, ridge, logits), with_side, key=lambda choice: choice[0])
    return logits if value < float(divergence(dense, plain).mean()) else plain


class _Fold:
    """A fit to all images but every third."""

    def __init__(self, features: Features, weight: Tensor, bias: Tensor, turn: int) -> None:
        rows = torch.arange(len(features))
        self.held = rows[rows % _FOLDS == turn]
        self._parts = features.take(self.held)
        self._fit = Fit(features.take(rows[rows % _FOLDS != turn]), weight, bias)

    def logits(self, ridge: Ridge) -> Tensor:
        """(held, classes)"""
        return self._fit.solve(ridge, _STEPS).logits(self._parts)
