"""A time as a budget: what a method may spend in multiply-adds so that a batch takes that long on this device."""

from __future__ import annotations

from functools import partial

import numpy as np

from ssmprune_cli.errors import UsageError
from ssmprune_cli.pruning import Method, PruneSettings
from ssmprune_cli.workflows.measure import interleaved_speeds
from ssmprune_cli.workflows.trials.candidates import layouts
from ssmprune_cli.workflows.trials.cost import Costs, schedule_at, solve
from ssmprune_cli.workflows.trials.measure import Measurements

_FRACTIONS = (0.85, 0.7, 0.55)
_ROUNDS = 5


class LatencyBudget:
    """method -> multiply-adds that take `milliseconds` for a batch of `batch_size` random images.

    Time grows nearly linearly with multiply-adds, at a rate of each reduction's own: a line through three uniform
    schedules, timed in turn with the dense model, tells it. `slack` scales the target after the result was timed.
    """

    def __init__(self, measurements: Measurements, milliseconds: float, batch_size: int, costs: Costs) -> None:
        self._measurements = measurements
        self._milliseconds = milliseconds
        self._batch_size = batch_size
        self._costs = costs
        self.slack = 1.0

    def __call__(self, method: Method) -> float:
        intercept, slope, _ = self._known_line(method)
        budget = (self._milliseconds * self.slack - intercept) / slope
        return min(budget, float(self._measurements.dense_cost))

    def share(self, method: Method, share: float) -> float:
        """Multiply-adds that take `share` of the dense model's time."""
        intercept, slope, dense = self._known_line(method)
        return min((share * dense - intercept) / slope, float(self._measurements.dense_cost))

    def measure(self, settings: PruneSettings) -> tuple[float, float]:
        """Median milliseconds of a batch of the pruned and of the dense model, timed in turn."""
        dense, pruned = self._time([settings])
        return pruned, dense

    def _known_line(self, method: Method) -> list[float]:
        key = f"latency {self._batch_size} {method.reduction} {method.alignment == 'none'}"
        return self._measurements.state.get(key, lambda: self._line(method))

    def _line(self, method: Method) -> list[float]:
        """Intercept (ms), slope (ms a multiply-add) and the dense model's time (ms)."""
        stages, dense = self._measurements.model.stages, self._measurements.dense_cost
        cost = self._costs.of(method)
        settings: list[PruneSettings] = []
        for points in layouts(stages, rectangular=method.rectangular):
            build = partial(schedule_at, stages, points, [1.0] * len(points), rectangular=method.rectangular)
            found = [solve(build, cost, share * dense) for share in _FRACTIONS]
            settings = [method.settings(schedule, 0) for schedule in found if schedule is not None]
            if len(settings) > 1:
                break
        times = self._time(settings)
        work = [float(dense), *(cost.predict(each.schedule) for each in settings)]
        slope, intercept = np.polyfit(work, times, 1) if len(work) > 1 else (times[0] / work[0], 0.0)
        if slope <= 0:  # noise, or a model too small to get faster: then its time is all overhead
            slope, intercept = 1e-12, times[0]
        return [float(intercept), float(slope), times[0]]

    def _time(self, settings: list[PruneSettings]) -> list[float]:
        """Median milliseconds of a batch of the dense model and of its pruned variants."""
        dense = self._measurements.session
        sessions = [dense, *(dense.with_pruner(self._measurements.pruner(each)) for each in settings)]
        images = self._measurements.images
        batch = images.repeat(-(-self._batch_size // len(images)), 1, 1, 1)[: self._batch_size]
        return [speed.median_ms for speed in interleaved_speeds(sessions, batch, _ROUNDS)]


def check_latency(budget: LatencyBudget, milliseconds: float, fastest: PruneSettings) -> None:
    """Raises UsageError, saying what can be met, if even the `fastest` variant takes longer than `milliseconds`."""
    pruned, dense = budget.measure(fastest)
    if pruned > milliseconds:
        raise UsageError(
            f"{milliseconds:g} ms cannot be reached on this device: the dense model takes {dense:.1f} ms a batch",
            hint=f"With one patch token left after each stage's first block it takes {pruned:.1f} ms; ask for more.",
        )
