"""Uniform schedules of any method at equal keep ratio, cost or time: what methods are compared at."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from ssmprune_cli.models import Backbone
from ssmprune_cli.pruning import Method, PruneSchedule, PruneSettings
from ssmprune_cli.workflows.trials.candidates import layouts
from ssmprune_cli.workflows.trials.cost import Costs, schedule_at, solve
from ssmprune_cli.workflows.trials.latency import LatencyBudget
from ssmprune_cli.workflows.trials.measure import Measurements


@dataclass(frozen=True)
class Budget:
    """How much every method may spend: `kind` is keep (a ratio at each point), flops or time (shares of dense)."""

    kind: str
    value: float


class Uniform:
    """The uniform schedule (one keep ratio, at the default points) of a method for a budget.

    Where the default points cannot save enough, the first of `layouts` that can. Costs come from `count_flops`.
    A time is measured on `images` (N, 3, H, W), `batch_size` at once.
    """

    def __init__(self, model: Backbone, images: Tensor, *, batch_size: int, seed: int = 0) -> None:
        self._measurements = Measurements(model, images, calibration=len(images), batch_size=batch_size)
        self._costs = Costs(self._measurements)
        self._batch_size = batch_size
        self._seed = seed

    def settings(self, method: Method, budget: Budget) -> PruneSettings | None:
        """None if the method cannot save so much."""
        stages = self._measurements.model.stages
        if budget.kind == "keep":
            schedule = PruneSchedule.resolve(stages, keep=budget.value, rectangular=method.rectangular)
            return method.settings(schedule, self._seed)
        work = budget.value * self._measurements.dense_cost
        if budget.kind == "time":
            timing = LatencyBudget(self._measurements, 0.0, self._batch_size, self._costs)
            work = timing.share(method, budget.value)
        for points in layouts(stages, rectangular=method.rectangular):
            build = partial(schedule_at, stages, points, [1.0] * len(points), rectangular=method.rectangular)
            solved = solve(build, self._costs.of(method), work)
            if solved is not None:
                return method.settings(solved, self._seed)
        return None
