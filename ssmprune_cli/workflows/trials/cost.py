"""Multiply-adds of a schedule in microseconds, learnt from a few that `count_flops` traced.

What a block costs is a linear function of how many tokens are live, frozen and in context, and of whether any is
missing; what is left, patch embedding, head and the pruner's own products, is one of the tokens that reach the head and
of the pairs of tokens that a reduction compares. A few traces tell the coefficients, another one checks them: where
they are not exact, every schedule is traced.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ssmprune_cli.errors import BudgetError, UsageError
from ssmprune_cli.interface import Stage
from ssmprune_cli.models import WHOLE, Size
from ssmprune_cli.pruning import REDUCTIONS, Method, PruneSchedule
from ssmprune_cli.tokens import Dropped, TokenSequence
from ssmprune_cli.workflows.measure import EveryOp, op_name
from ssmprune_cli.workflows.trials.measure import Measurements

Vector = NDArray[np.float64]
Shapes = tuple[object, ...]

_TRACES = 3
_FRACTIONS = (0.75, 0.3)  # of the tokens of a grid that becomes smaller
_EXACT = 1e-6  # relative
_CLOSE = 0.004  # how much of a budget may be left where every schedule has to be traced


class Spends(Protocol):
    """What schedules of one method spend: predicted, and as it really is where predictions cannot be relied on."""

    def predict(self, schedule: PruneSchedule) -> float: ...

    def checked(self, schedule: PruneSchedule) -> float | None: ...


class Costs:
    """The cost models of a model's methods, made when they are asked for."""

    def __init__(self, measurements: Measurements) -> None:
        self._measurements = measurements
        self._models: dict[Size, dict[tuple[str, bool], CostModel]] = {}

    def of(self, method: Method, size: Size = WHOLE) -> CostModel:
        """Scores cost nothing that is counted, and all ways to align cost the same: they share a model. So do models
        that differ in how many blocks they have: each of them costs the same."""
        known = self._models.setdefault(size, {})
        key = (method.reduction, method.alignment != "none")
        if key not in known:
            alike = [models for other, models in self._models.items() if other.side == size.side]
            others = [models[key] for models in alike if key in models] + list(known.values())
            known[key] = CostModel(self._measurements.at(size), method, others)
        return known[key]


class CostModel:
    """Multiply-adds of one method's schedules. `exact` says whether `predict` gave those of a schedule it had not seen.

    others  models of other methods: one that fits as it is saves traces
    """

    def __init__(self, measurements: Measurements, method: Method, others: Sequence[CostModel] = ()) -> None:
        self._measurements = measurements
        self._method = method
        model = measurements.model
        self._stages = model.stages
        names = {id(module): name for name, module in model.named_modules()}
        self._groups: list[
            Shapes
        ] = []  # blocks whose mixers are alike cost the same but for what is around the mixers,
        self._kinds: list[Shapes] = []  # which all live tokens go through
        for stage in self._stages:
            for mixer in model.mixers[stage.start : stage.stop]:
                assert isinstance(mixer, nn.Module)
                block = model.get_submodule(names[id(mixer)].rsplit(".", 1)[0])
                self._groups.append((stage.num_tokens, *(tuple(each.shape) for each in mixer.parameters())))
                self._kinds.append((stage.num_tokens, *(tuple(each.shape) for each in block.parameters())))
        self._coefficients: dict[Shapes, Vector] = {}
        self._rest: Vector
        unseen = _example(self._stages, 0, method.rectangular)
        total = self.count(unseen)
        for other in others:
            self._coefficients, self._rest = other._coefficients, other._rest
            self.exact = math.isclose(self.predict(unseen), total, rel_tol=_EXACT)
            if self.exact:
                return
        for examples in self._examples():
            self._fit(examples)
            self.exact = math.isclose(self.predict(unseen), total, rel_tol=_EXACT)
            if self.exact:
                return

    def checked(self, schedule: PruneSchedule) -> float | None:
        """What `count_flops` says, if predictions are not exact; else None."""
        return None if self.exact else self.count(schedule)

    def count(self, schedule: PruneSchedule) -> int:
        """As `count_flops` says."""
        return self._measurements.multiply_adds(self._method.settings(schedule, 0))

    def predict(self, schedule: PruneSchedule) -> float:
        rows, rest = self._features(schedule)
        costs = (row @ self._coefficients[group] for row, group in zip(rows, self._groups, strict=True))
        return float(rest @ self._rest) + math.fsum(costs)

    def _examples(self) -> Iterator[list[PruneSchedule]]:
        """Schedules to learn from; more than those if they are too few."""
        if self._method.rectangular:
            yield list(_smaller_grids(self._stages))
            return
        for traces in (_TRACES, 2 * _TRACES):  # the second for models with few blocks of a kind
            yield [_example(self._stages, seed, False) for seed in range(1, traces + 1)]

    def _fit(self, schedules: Sequence[PruneSchedule]) -> None:
        rows: dict[Shapes, list[Vector]] = {group: [] for group in self._groups}
        values: dict[Shapes, list[int]] = {group: [] for group in self._groups}
        rest_rows, rest_values = [], []
        for schedule in schedules:
            costs = self._measurements.per_block(self._method.settings(schedule, 0))
            features, rest = self._features(schedule)
            for row, cost, group in zip(features, costs, self._groups, strict=True):
                rows[group].append(row)
                values[group].append(cost)
            rest_rows.append(rest)
            rest_values.append(self.count(schedule) - sum(costs))
        self._coefficients = {group: _solution(rows[group], values[group]) for group in rows}
        self._rest = _solution(rest_rows, rest_values)

    def _features(self, schedule: PruneSchedule) -> tuple[list[Vector], Vector]:
        """For each block frozen and context tokens, whether live ones are missing and if so how many there are, the
        same for live and frozen ones together, and for its own kind 1 and live tokens; then, for what is no block, 1,
        the live tokens at the end, the pairs compared in each stage, and the tokens that each stage starts with."""
        kinds = list(dict.fromkeys(self._kinds))
        kept = dict(zip(schedule.points, schedule.tokens, strict=True))
        patches = schedule.patches_per_block(self._stages)
        merging = [point for point, count in kept.items() if count < patches[point - 1]]
        rows, pairs = [], []
        now = _Tokens(0)
        for stage in self._stages:
            now, compared = _Tokens(patches[stage.start]), 0
            for block in range(stage.start, stage.stop):
                if schedule.grids:  # no tokens but live ones, and no pairs in products
                    now = _Tokens(patches[block])
                elif kept.get(block, now.live) < now.live:
                    now, more = _reduced(self._method.reduction, stage, now, kept[block])
                    compared += more
                scanned = now.live + now.frozen
                missing, short = (float(count < stage.num_patches) for count in (now.live, scanned))
                if schedule.grids:  # a stage can begin with all places, and merged tokens in them
                    missing = short = float(any(point <= block for point in merging))
                row = [now.frozen, now.context, missing, missing * now.live, short, short * scanned]
                for kind in kinds:
                    own = self._kinds[block] == kind
                    row += [own, own * now.live]
                rows.append(np.array(row, dtype=float))
            pairs.append(float(compared))
        starts = [float(patches[stage.start]) for stage in self._stages]
        return rows, np.array([1.0, float(now.live), *pairs, *starts])


@dataclass(frozen=True)
class _Tokens:
    """How many patch tokens a block has."""

    live: int
    frozen: int = 0
    context: int = 0


class _Products(EveryOp):
    """Adds up the multiply-adds of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def around(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        if op_name(func) in ("mm", "bmm"):
            self.count += result.numel() * args[0].shape[-1]
        return result


@lru_cache(maxsize=65536)
def _reduced(reduction: str, stage: Stage, before: _Tokens, count: int) -> tuple[_Tokens, int]:
    """What a reduction leaves of `before` when `count` live ones are to stay, and the pairs of tokens it compares.

    Shapes do not depend on what is in the tokens, so it is seen from one sample of tokens one number wide.
    """
    protected = len(stage.protected)
    dropped = iter(position for position in range(stage.num_tokens) if position not in stage.protected)

    def group(size: int) -> Dropped | None:
        positions = torch.tensor([[next(dropped) for _ in range(size)]])
        return Dropped(torch.zeros(1, size, 1), positions) if size else None

    frozen, context = group(before.frozen), group(before.context)
    live = sorted([*[next(dropped) for _ in range(before.live)], *stage.protected])
    sequence = TokenSequence(
        torch.zeros(1, len(live), 1),
        None,
        torch.tensor([live]),
        stage.num_tokens,
        stage.protected,
        frozen=frozen,
        context=context,
    )
    with _Products() as products:
        after = REDUCTIONS.get(reduction).apply(sequence, torch.zeros(1, len(live)), count + protected)
    sizes = (0 if each is None else each.positions.shape[1] for each in (after.frozen, after.context))
    return _Tokens(after.positions.shape[1] - protected, *sizes), products.count


def _solution(rows: Sequence[Vector], values: Sequence[int]) -> Vector:
    found: Vector = np.linalg.lstsq(np.array(rows), np.array(values, dtype=float), rcond=None)[0]
    return found


def _example(stages: Sequence[Stage], seed: int, rectangular: bool) -> PruneSchedule:
    """A schedule with irregular points and counts in every stage of at least two blocks."""
    choice = random.Random(seed)
    if rectangular:
        places = range(1, stages[-1].stop)
        points = sorted(choice.sample(places, max(1, 2 * len(places) // 3)))
        return schedule_at(stages, points, [choice.random() for _ in points], 3 / len(points), rectangular)
    points, tokens = [], []
    for stage in stages:
        inside = range(stage.start + 1, stage.stop)
        own = sorted(choice.sample(inside, min(len(inside), max(1, 2 * len(inside) // 3))))
        points += own
        tokens += sorted(choice.sample(range(1, stage.num_patches), min(len(own), stage.num_patches - 1)), reverse=True)
        while len(tokens) < len(points):
            tokens.append(tokens[-1])
    return PruneSchedule(tuple(points), tuple(tokens))


def _smaller_grids(stages: Sequence[Stage]) -> Iterator[PruneSchedule]:
    """The dense grid, and grids that become smaller before each stage and before the last block, by much and by little:
    so each block is seen with all places and with fewer, and the stages in more than one proportion."""
    dense = PruneSchedule((), ())
    yield dense
    for point in sorted({*(max(1, stage.start) for stage in stages), stages[-1].stop - 1} - {0, stages[-1].stop}):
        before = dense.patches_per_block(stages)[point - 1]
        for fraction in _FRACTIONS:
            yield dense.then(point, max(1, int(fraction * before)), stages, rectangular=True)


def schedule_at(
    stages: Sequence[Stage],
    points: Sequence[int],
    weights: Sequence[float],
    level: float,
    rectangular: bool = False,
) -> PruneSchedule:
    """At point i, exp(-level * weights[i]) of the tokens stay that its stage has left, at least one; of a rectangular
    reduction, that all points before have left, or as many as make a grid."""
    schedule, share = PruneSchedule((), ()), 1.0
    for i, (point, weight) in enumerate(zip(points, weights, strict=True)):
        stage = next(stage for stage in stages if stage.start < point <= stage.stop)
        if not rectangular and (i == 0 or points[i - 1] <= stage.start):
            share = 1.0
        share *= math.exp(-level * weight)
        count = max(1, math.ceil(stage.num_patches * share - 1e-9))
        schedule = schedule.then(point, count, stages, rectangular=rectangular)
    return schedule


def solve(build: Callable[[float], PruneSchedule], cost: Spends, budget: float) -> PruneSchedule | None:
    """The most costly schedule of `build` (level -> schedule, level 0 is dense) within `budget`, or None.

    By bisection on the predicted cost; where that cannot be relied on, corrected by what it really is.
    """
    target, best = budget, None
    for _ in range(5):
        schedule = _bisect(build, cost, target)
        if schedule is None:
            break
        known = cost.checked(schedule)
        if known is None:
            return schedule
        excess = known - budget
        if excess <= 0:
            best = schedule
        if -_CLOSE * budget <= excess <= 0:
            break
        target -= excess if excess > 0 else excess / 2
    return best


def _bisect(build: Callable[[float], PruneSchedule], cost: Spends, budget: float) -> PruneSchedule | None:
    low, high = 0.0, 16.0
    if cost.predict(build(high)) > budget:
        return None
    for _ in range(40):
        if build(low) == build(high):
            break
        middle = (low + high) / 2
        if cost.predict(build(middle)) > budget:
            low = middle
        else:
            high = middle
    return build(high)


def check_budget(
    measurements: Measurements, methods: Sequence[Method], fraction: float, sizes: Sequence[Size] = ()
) -> None:
    """Raises UsageError, saying what can be met, if no schedule of `methods` costs as little as `fraction` of dense,
    and no model of one of these `sizes` does with all tokens."""
    if not 0 < fraction < 1:
        raise BudgetError(f"a budget lies between 0 and 1 of the dense model's multiply-adds, not at {fraction:g}")
    smaller = [measurements.at(size).dense_cost / measurements.dense_cost for size in sizes]
    if min(smaller, default=math.inf) <= fraction:
        return
    lowest = measurements.dense_cost
    for method in {method.reduction: method for method in methods}.values():
        least = smallest(measurements.model.stages, method)
        lowest = min(lowest, measurements.multiply_adds(method.settings(least, 0)))
        if lowest <= fraction * measurements.dense_cost:
            return
    also = f", the smallest model with all tokens {min(smaller):.3f}" if smaller else ""
    raise BudgetError(
        f"{fraction:g} of the dense multiply-adds cannot be reached",
        hint=f"One patch token left after the first block of every stage costs "
        f"{lowest / measurements.dense_cost:.3f} of them{also}; ask for more.",
    )


def smallest(stages: Sequence[Stage], method: Method) -> PruneSchedule:
    """One patch token left after the first block of every stage; of a whole grid after the very first block. UsageError
    if no stage has two blocks."""
    points = tuple(stage.start + 1 for stage in stages if stage.stop - stage.start > 1)
    if not points:
        raise UsageError("no stage of this model has two blocks, so there is no place to prune after")
    if method.rectangular:
        return PruneSchedule((), ()).then(1, 1, stages, rectangular=True)
    return PruneSchedule(points, (1,) * len(points))
