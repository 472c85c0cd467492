"""Token counts that fall over the first epochs to those of the schedule."""

from __future__ import annotations

from collections.abc import Sequence

from ssmprune_cli.interface import Stage
from ssmprune_cli.pruning import PruneSchedule


class ProgressiveSchedule:
    """In epoch e (from 0) of the first `epochs`, (e + 1) / epochs of the tokens are dropped that will be at last."""

    def __init__(self, schedule: PruneSchedule, stages: Sequence[Stage], epochs: int) -> None:
        self._last, self._stages = schedule, stages
        self._epochs = epochs
        self._all = [
            next(stage.num_patches for stage in stages if stage.start < point <= stage.stop)
            for point in schedule.points
        ]

    def at(self, epoch: int) -> PruneSchedule:
        """The schedule of `epoch`."""
        missing = self._epochs - min(epoch + 1, self._epochs)
        schedule = PruneSchedule((), ())
        for point, count, whole in zip(self._last.points, self._last.tokens, self._all, strict=True):
            tokens = count + (whole - count) * missing // self._epochs
            schedule = schedule.then(point, tokens, self._stages, rectangular=bool(self._last.grids))
        return schedule
