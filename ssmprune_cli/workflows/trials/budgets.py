"""What a schedule may spend: multiply-adds or time, and the uniform schedules that methods are compared at."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

from ssmprune_cli.models import WHOLE, Backbone, Size
from ssmprune_cli.pruning import Method, PruneSchedule, PruneSettings
from ssmprune_cli.workflows.trials.candidates import layouts
from ssmprune_cli.workflows.trials.clock import Clock, TimeTable
from ssmprune_cli.workflows.trials.cost import Costs, Spends, schedule_at, solve
from ssmprune_cli.workflows.trials.measure import Images, Measurements

Kind = Literal["keep", "flops", "time"]


@dataclass(frozen=True)
class Budget:
    """How much may be spent: `kind` is keep (a ratio at each point), flops or time (shares of dense)."""

    kind: Kind
    value: float

    def __str__(self) -> str:
        return f"{self.kind} {self.value:g}"


class Spending(Protocol):
    """Multiply-adds (see Costs) or time (see Clock) of one model's schedules, in a unit of its own."""

    def of(self, method: Method, size: Size = WHOLE) -> Spends: ...


class Uniform:
    """The uniform schedule (one keep ratio, at the default points) of a method for a budget.

    Where the default points cannot save enough, the first of `layouts` that can. Costs come from `count_flops`.
    A time is measured with `batch_size` images at once.
    """

    def __init__(self, model: Backbone, images: Images, *, batch_size: int, seed: int = 0) -> None:
        self._measurements = Measurements(model, images, calibration=len(images), batch_size=batch_size)
        self._costs = Costs(self._measurements)
        device = str(next(model.parameters()).device)
        self._clock = Clock(self._measurements, batch_size, TimeTable.of(model, device, batch_size))
        self._seed = seed

    def settings(self, method: Method, budget: Budget) -> PruneSettings | None:
        """None if the method cannot save so much."""
        stages = self._measurements.model.stages
        if budget.kind == "keep":
            schedule = PruneSchedule.resolve(stages, keep=budget.value, rectangular=method.rectangular)
            return method.settings(schedule, self._seed)
        spends: Spends = self._costs.of(method)
        limit = budget.value * self._measurements.dense_cost
        if budget.kind == "time":
            spends, limit = self._clock.of(method), budget.value
        for points in layouts(stages, rectangular=method.rectangular):
            build = partial(schedule_at, stages, points, [1.0] * len(points), rectangular=method.rectangular)
            solved = solve(build, spends, limit)
            if solved is not None:
                return method.settings(solved, self._seed)
        return None
