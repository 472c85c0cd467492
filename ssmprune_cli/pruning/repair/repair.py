"""`repair`: corrections of a pruned model in closed form, from unlabelled images, accepted only where they help."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from ssmprune_cli.errors import UsageError
from ssmprune_cli.pruning.calibration import Prunable
from ssmprune_cli.pruning.correction import Correction, Kind, Repaired
from ssmprune_cli.pruning.divergence import clearly_less, divergence, paired
from ssmprune_cli.pruning.images import Images, as_batches
from ssmprune_cli.pruning.pruner import TokenPruner
from ssmprune_cli.pruning.repair.features import Features, Runner, collect, model_runner
from ssmprune_cli.pruning.repair.fit import Fit, Head, Ridge

Asked = Literal["auto", "head", "head+side", "none"]
KINDS: tuple[Asked, ...] = ("auto", "head", "head+side", "none")

LEAST = 64  # images: with fewer nothing is tried
ENOUGH = 1024  # with fewer it is the exception that the guard accepts a fit (10 classes)
RIDGES = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
_FOLDS = 5  # one of them is held back

Choice = tuple[Ridge, Tensor]  # and the divergences (n,) of the images held back


def repair(
    model: Prunable,
    images: Images,
    *,
    kind: Asked = "auto",
    runner: Runner | None = None,
    dense: Tensor | None = None,
) -> Repaired:
    """Make `model` answer more like the dense model, in place. What is accepted is in its pruner: no weights change.
    A model for smaller images that drops no token has no pruner, so its own head changes.

    images  unlabelled, as `as_batches` takes them; every batch goes through the dense and the pruned model once
    kind    `head`: another head. `head+side`: that head also sees the means of the dropped tokens. `auto`: the better
            of the two. All only if it is clearly better on images that are held back
    runner  runs the model with another pruner; by default the model itself, op by op
    dense   logits (images, classes) of the same images, in their order, to come near to; by default those of `model`
            without its pruner. Give the dense model's if `model` was resized

    One image of five is held back from the fit that is judged; with fewer than ENOUGH images each of them is, in turn.
    What is accepted is then fitted to all images. Raises UsageError for a model that drops no token without `dense`.
    """
    pruner, start = model.pruner, time.perf_counter()
    if not isinstance(pruner, TokenPruner) and (pruner is not None or dense is None):
        raise UsageError(
            "only a pruned model can be repaired, or one for smaller images",
            hint="Call `compress(model, keep=...)` first, or give the logits of the `dense` model.",
        )
    if pruner is not None:
        pruner.correct(Correction())
    if kind == "none":
        return Repaired("none", 0)
    reason = _hopeless(model, pruner, kind)
    if reason is not None:
        both: tuple[Kind, ...] = ("head", "head+side")
        return Repaired("none", 0, refused={each: reason for each in both if kind in ("auto", each)})
    layer = model.output_layer
    weight = layer.weight.detach().double().cpu()
    bias = layer.bias.detach().double().cpu()
    last, run = len(model.mixers) - 1, runner or model_runner(model)
    features = collect(pruner, last, weight.shape[1], as_batches(model, images), run, dense)
    points = () if pruner is None else pruner.dropping_points
    widths = {point: model.mixers[point - 1].d_model for point in points}
    # Without side features where no token is lost: `mask` and a merged grid lose none either.
    kinds: list[Kind] = ["head", "head+side"] if points else ["head"]
    found, correction = _repaired(features, weight, bias, [each for each in kinds if kind in ("auto", each)], widths)
    if correction is not None:
        if pruner is None:
            _take_head(model, correction)
        else:
            pruner.correct(correction)
            pruner.to(layer.weight.device, layer.weight.dtype)
    return replace(found, seconds=time.perf_counter() - start)


def _hopeless(model: Prunable, pruner: TokenPruner | None, kind: Asked) -> str | None:
    """Why there is nothing to repair; None if there may be."""
    if pruner is not None and not pruner.drops:
        return "no token is dropped, so there is nothing to repair"
    if kind == "head+side" and pruner is None:
        return "no token is dropped, so there is no mean of dropped ones"
    if kind == "head+side" and pruner is not None and not pruner.dropping_points:
        does = "only zeroes tokens" if pruner.goes_by_score else "merges tokens and loses none"
        return f"the reduction {pruner.settings.reduction!r} {does}, so there is no mean of dropped ones"
    try:
        layer: object = model.output_layer
    except UsageError as error:
        return error.what
    if not isinstance(layer, nn.Linear) or layer.bias is None:
        return f"the head is a {type(layer).__name__}, and a repair is for a linear layer with a bias"
    return None


def _repaired(
    features: Features, weight: Tensor, bias: Tensor, kinds: Sequence[Kind], widths: Mapping[int, int]
) -> tuple[Repaired, Correction | None]:
    """What the guard says of `kinds`, and what it accepts; `widths` are those of the side features of each point."""
    count = len(features)
    if count < LEAST:
        few = f"{count} images are too few: it takes {LEAST}, and better {ENOUGH:,}"
        return Repaired("none", count, refused=dict.fromkeys(kinds, few)), None
    finite = all(bool(each.isfinite().all()) for each in (features.pooled, features.side, features.dense))
    if not finite:
        bad = "the model's features or the dense model's answers are not finite on these images"
        return Repaired("none", count, refused=dict.fromkeys(kinds, bad)), None
    folds = _folds(count)
    held_back = judged_rows(count)
    before = divergence(features.dense, features.pooled @ weight.T + bias)[held_back]
    choices = _choices(features, weight, bias, kinds, folds)
    accepted = {each: choice for each, choice in choices.items() if clearly_less(choice[1], before)}
    best = min(accepted, key=lambda each: float(accepted[each][1].mean()), default=None)
    judged = Repaired(
        best or "none",
        count,
        len(held_back),
        float(before.mean()),
        refused={each: _why(choices[each][1], before) for each in choices if each not in accepted},
        judged=before,
        warnings=_few(count),
    )
    if best is None:
        return judged, None
    ridge, after = accepted[best]
    mean, error = paired(after, before)
    change = (mean - 1.96 * error, mean + 1.96 * error)
    judged = replace(judged, after=float(after.mean()), change=change, judged=after)
    chosen = features if best == "head+side" else features.without_side()
    return judged, _correction(Fit(chosen, weight, bias).solve(ridge), widths if best == "head+side" else {})


def _few(count: int) -> tuple[str, ...]:
    if count >= ENOUGH:
        return ()
    return (f"The repair had {count} images; {ENOUGH:,} are the least to recommend.",)


def _why(after: Tensor, before: Tensor) -> str:
    mean, error = paired(after, before)
    return (
        f"not clearly better on images held back: the divergence changes by {mean:+.4f} ± {error:.4f} nats from "
        f"{float(before.mean()):.4f}"
    )


def _folds(count: int) -> list[tuple[Tensor, Tensor]]:
    """Numbers of the images to fit to and of those to judge by, once or more often. Every fifth is held back together:
    images often come class by class."""
    rows = torch.arange(count)
    turns = range(_FOLDS) if count < ENOUGH else range(1)
    return [(rows[rows % _FOLDS != turn], rows[rows % _FOLDS == turn]) for turn in turns]


def judged_rows(count: int) -> Tensor:
    """Numbers of the images, of so many, that `Repaired.judged` is of, in its order."""
    return torch.cat([held for _, held in _folds(count)])


def _choices(
    features: Features,
    weight: Tensor,
    bias: Tensor,
    kinds: Sequence[Kind],
    folds: Sequence[tuple[Tensor, Tensor]],
) -> dict[Kind, Choice]:
    """The best ridge of every kind that is asked for, by the images held back.

    With side features: of the side's ridge at the head's best one, then of the head's at that.
    """

    def judge(parts: Features) -> Callable[[Ridge], Tensor]:
        fits = [(Fit(parts.take(rows), weight, bias), parts.take(held)) for rows, held in folds]
        known: dict[Ridge, Tensor] = {}

        def divergences(ridge: Ridge) -> Tensor:
            if ridge not in known:
                logits = [(held.dense, fit.solve(ridge).logits(held)) for fit, held in fits]
                known[ridge] = torch.cat([divergence(dense, found) for dense, found in logits])
            return known[ridge]

        return divergences

    def best(divergences: Callable[[Ridge], Tensor], ridges: Sequence[Ridge]) -> Choice:
        return min(((ridge, divergences(ridge)) for ridge in ridges), key=lambda choice: float(choice[1].mean()))

    found: dict[Kind, Choice] = {"head": best(judge(features.without_side()), [Ridge(value, 1.0) for value in RIDGES])}
    if "head+side" in kinds:
        divergences, head = judge(features), found["head"][0].head
        side_ridge = best(divergences, [Ridge(head, value) for value in RIDGES])[0].side
        found["head+side"] = best(divergences, [Ridge(value, side_ridge) for value in RIDGES])
    return {each: found[each] for each in kinds}


def _correction(head: Head, widths: Mapping[int, int]) -> Correction:
    projection, first, side = head.projection(), 0, {}
    for point, width in widths.items():
        side[point] = projection[:, first : first + width].contiguous()
        first += width
    return Correction((head.weight, head.bias), side)


def fold_head(model: Prunable) -> None:
    """Make the repaired head of `model`, if its pruner holds one, the model's own, so that it can be trained. The model
    computes the same; its dense weights are changed."""
    pruner = model.pruner
    if not isinstance(pruner, TokenPruner):
        return
    correction = pruner.correction
    if correction.head is None:
        return
    _take_head(model, correction)
    pruner.correct(Correction(None, correction.side))


@torch.no_grad()
def _take_head(model: Prunable, correction: Correction) -> None:
    assert correction.head is not None
    model.output_layer.weight.copy_(correction.head[0])
    model.output_layer.bias.copy_(correction.head[1])
