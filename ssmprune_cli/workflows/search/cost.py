"""Multiply-adds of a schedule in microseconds, learnt from a few that `count_flops` traced.

What a block costs is a linear function of how many tokens are live, how many were just dropped (a reduction may go on
looking at them) and whether any were: for one method, and blocks with the same weights' shapes, three traces tell it.
Another checks it. Where it is not exact, every schedule is traced.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ssmprune_cli.errors import UsageError
from ssmprune_cli.interface import Stage
from ssmprune_cli.pruning import PruneSchedule
from ssmprune_cli.pruning.method import Method
from ssmprune_cli.workflows.search.measure import Measurements

Vector = NDArray[np.float64]

_TRACES = 3
_EXACT = 1e-6  # relative
_CLOSE = 0.004  # how much of a budget may be left where every schedule has to be traced


class CostModel:
    """Multiply-adds of one method's schedules. `exact` says whether `predict` gave those of a schedule it had not seen.

    others  models of other methods: one that fits as it is saves three traces
    """

    def __init__(self, measurements: Measurements, method: Method, others: Iterable[CostModel] = ()) -> None:
        self._measurements = measurements
        self._method = method
        model = measurements.model
        self._stages = model.stages
        self._groups: list[tuple[object, ...]] = []
        for stage in self._stages:
            for mixer in model.mixers[stage.start : stage.stop]:
                assert isinstance(mixer, nn.Module)
                self._groups.append((stage.num_tokens, *(tuple(weight.shape) for weight in mixer.parameters())))
        self._coefficients: dict[tuple[object, ...], Vector]
        self._rest: int
        schedules = [_example(self._stages, seed) for seed in range(_TRACES + 1)]
        unseen = schedules.pop()
        total = self.count(unseen)
        for other in others:
            self._coefficients, self._rest = other._coefficients, other._rest
            self.exact = math.isclose(self.predict(unseen), total, rel_tol=_EXACT)
            if self.exact:
                return
        blocks = [measurements.per_block(method.settings(schedule, 0)) for schedule in schedules]
        self._coefficients = {group: self._fit(group, schedules, blocks) for group in set(self._groups)}
        # Patch embedding and head, and what the pruner itself computes.
        self._rest = self.count(schedules[0]) - sum(blocks[0])
        self.exact = math.isclose(self.predict(unseen), total, rel_tol=_EXACT)

    def count(self, schedule: PruneSchedule) -> int:
        """As `count_flops` says."""
        return self._measurements.multiply_adds(self._method.settings(schedule, 0))

    def predict(self, schedule: PruneSchedule) -> float:
        rows = _features(schedule, self._stages)
        return self._rest + math.fsum(
            row @ self._coefficients[group] for row, group in zip(rows, self._groups, strict=True)
        )

    def _fit(
        self, group: tuple[object, ...], schedules: Sequence[PruneSchedule], blocks: Sequence[Sequence[int]]
    ) -> Vector:
        rows, values = [], []
        for schedule, costs in zip(schedules, blocks, strict=True):
            for row, cost, own in zip(_features(schedule, self._stages), costs, self._groups, strict=True):
                if own == group:
                    rows.append(row)
                    values.append(cost)
        solution: Vector = np.linalg.lstsq(np.array(rows), np.array(values, dtype=float), rcond=None)[0]
        return solution


def _features(schedule: PruneSchedule, stages: Sequence[Stage]) -> list[Vector]:
    """For each block: 1, live tokens, whether any were dropped, live tokens if so, tokens dropped at the last point.

    The last is at how many points an odd number was dropped: a reduction may pair them.
    """
    kept = dict(zip(schedule.points, schedule.tokens, strict=True))
    rows = []
    for stage in stages:
        whole = live = stage.num_patches
        last = odd = 0
        for block in range(stage.start, stage.stop):
            if block in kept:
                last, live = live - kept[block], kept[block]
                odd += last % 2
            dropped = float(live < whole)
            rows.append(np.array([1.0, live, dropped, dropped * live, last, odd]))
    return rows


def _example(stages: Sequence[Stage], seed: int) -> PruneSchedule:
    """A schedule with irregular points and counts in every stage of at least two blocks."""
    choice = random.Random(seed)
    points: list[int] = []
    tokens: list[int] = []
    for stage in stages:
        inside = range(stage.start + 1, stage.stop)
        own = sorted(choice.sample(inside, min(len(inside), max(1, 2 * len(inside) // 3))))
        points += own
        tokens += sorted(choice.sample(range(1, stage.num_patches), min(len(own), stage.num_patches - 1)), reverse=True)
        while len(tokens) < len(points):
            tokens.append(tokens[-1])
    return PruneSchedule(tuple(points), tuple(tokens))


def schedule_at(
    stages: Sequence[Stage], points: Sequence[int], weights: Sequence[float], level: float
) -> PruneSchedule:
    """At point i, exp(-level * weights[i]) of the tokens stay that its stage has left, at least one."""
    tokens: list[int] = []
    share = 1.0
    for i, (point, weight) in enumerate(zip(points, weights, strict=True)):
        stage = next(stage for stage in stages if stage.start < point < stage.stop)
        if i == 0 or points[i - 1] <= stage.start:
            share = 1.0
        share *= math.exp(-level * weight)
        tokens.append(max(1, math.ceil(stage.num_patches * share - 1e-9)))
    return PruneSchedule(tuple(points), tuple(tokens))


def solve(build: Callable[[float], PruneSchedule], cost: CostModel, budget: float) -> PruneSchedule | None:
    """The most costly schedule of `build` (level -> schedule, level 0 is dense) within `budget` multiply-adds, or None.

    Found by bisection on the predicted cost; where that is not exact, corrected by what `count_flops` says.
    """
    target, best = budget, None
    for _ in range(1 if cost.exact else 5):
        schedule = _bisect(build, cost, target)
        if schedule is None:
            break
        excess = 0.0 if cost.exact else cost.count(schedule) - budget
        if excess <= 0:
            best = schedule
        if -_CLOSE * budget <= excess <= 0:
            break
        target -= excess if excess > 0 else excess / 2
    return best


def _bisect(build: Callable[[float], PruneSchedule], cost: CostModel, budget: float) -> PruneSchedule | None:
    low, high = 0.0, 16.0
    if cost.predict(build(high)) > budget:
        return None
    for _ in range(40):
        middle = (low + high) / 2
        if cost.predict(build(middle)) > budget:
            low = middle
        else:
            high = middle
    return build(high)


def check_budget(measurements: Measurements, methods: Sequence[Method], fraction: float) -> None:
    """Raises UsageError, saying what can be met, if no schedule of `methods` costs as little as `fraction` of dense."""
    if not 0 < fraction < 1:
        raise UsageError(f"a budget lies between 0 and 1 of the dense model's multiply-adds, not at {fraction:g}")
    stages = measurements.model.stages
    points = tuple(stage.start + 1 for stage in stages if stage.stop - stage.start > 1)
    if not points:
        raise UsageError("no stage of this model has two blocks, so there is no place to prune after")
    least = PruneSchedule(points, (1,) * len(points))
    reductions = {method.reduction: method for method in methods}
    lowest = min(measurements.multiply_adds(method.settings(least, 0)) for method in reductions.values())
    if lowest > fraction * measurements.dense_cost:
        raise UsageError(
            f"{fraction:g} of the dense multiply-adds cannot be reached",
            hint=f"One patch token left after the first block of every stage costs "
            f"{lowest / measurements.dense_cost:.3f} of them; ask for more.",
        )
