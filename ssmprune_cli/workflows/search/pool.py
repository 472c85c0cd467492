"""What the candidates of one search are at its budget, how near they were to the dense model, and what that took."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch

from ssmprune_cli.interface import Stage
from ssmprune_cli.models import WHOLE, Size
from ssmprune_cli.pruning import LEAST, Method, PruneSchedule
from ssmprune_cli.workflows.search.trial import Limits
from ssmprune_cli.workflows.trials import (
    Budget,
    Candidate,
    Clock,
    Costs,
    Distances,
    Measurements,
    Spending,
    Timing,
    Variant,
    schedule_at,
    solve,
    uniform,
)

Progress = Callable[[int, int], None]
Quick = Literal["head", "head+side"]


class Pool:
    """Every candidate is solved once for `budget`, and every variant judged once on so many of the images `searched`.

    methods  of which the first stands for all where no token is dropped
    quick    what a quick repair of every candidate may fit, on LEAST search images at least; None for none
    """

    def __init__(
        self,
        measurements: Measurements,
        methods: Sequence[Method],
        budget: Budget,
        searched: range,
        *,
        costs: Costs,
        clock: Clock,
        quick: Quick | None,
        seed: int,
        limits: Limits,
        progress: Progress | None,
    ) -> None:
        self.measurements = measurements
        self._clock = clock
        self.timed = budget.kind == "time"
        self.spending: Spending = clock if self.timed else costs
        self.limit = budget.value if self.timed else budget.value * measurements.dense_cost
        self.searched = searched
        count = len(searched)
        self.quick = quick
        least = 1 if quick is None else LEAST
        self.rungs = sorted({max(least, count // 4), max(least, count // 2), count})
        self._first, self._seed = methods[0], seed
        self._limits = limits
        self._progress = progress
        self._known: dict[tuple[Variant, int], Distances] = {}  # on so many of the first search images
        self._candidates: dict[Candidate, Variant | None] = {}
        self._successor: dict[Variant, Variant] = {}  # to what pruned harder in its place
        self._done = 0.0
        self._started = time.monotonic()

    def stages(self, size: Size) -> Sequence[Stage]:
        return self.measurements.at(size).model.stages

    def harder(self, variant: Variant, timing: Timing) -> Variant | None:
        """The same candidate with fewer tokens, by as much as it overran the budget; None if there is none."""
        candidate = next(each for each, solved in self._candidates.items() if solved == variant)
        model = self._clock.of(candidate.method, candidate.size)
        limit = model.predict(variant.settings.schedule) * 0.99 * self.limit / timing.ratio
        schedule = solve(self._build(candidate), model, limit)
        harder = None if schedule is None else Variant(candidate.method.settings(schedule, self._seed), candidate.size)
        if harder is None or harder == variant:
            return None
        self._candidates[candidate] = harder
        self._successor = {each: harder if last == variant else last for each, last in self._successor.items()}
        self._successor[variant] = harder
        return harder

    def successor(self, variant: Variant) -> Variant:
        """What pruned harder in its place, if anything did."""
        return self._successor.get(variant, variant)

    def distances(self, variant: Variant, count: int | None = None) -> Distances:
        """On the first `count` search images, by default on all."""
        count = len(self.searched) if count is None else count
        if (variant, count) not in self._known:
            self._known[variant, count] = self._compared(variant, count)
            if self._progress:
                self._progress(min(round(self._done), self._limits.evaluations), self._limits.evaluations)
        return self._known[variant, count]

    def _compared(self, variant: Variant, count: int) -> Distances:
        first = self.searched.start
        if self.quick is not None:  # a fit to more images is another one: nothing of one to fewer is left
            self._done += count / len(self.searched)
            side = self.quick == "head+side"
            part = range(first, first + count)
            return self.measurements.at(variant.size).repaired(variant.settings, part, side=side)
        known = max((tried for each, tried in self._known if each == variant), default=0)
        if known > count:
            return Distances(*(each[:count] for each in self._known[variant, known]))
        self._done += (count - known) / len(self.searched)
        more = self.measured(variant, range(first + known, first + count))
        return Distances(*map(torch.cat, zip(self._known[variant, known], more, strict=True))) if known else more

    def variant(self, candidate: Candidate) -> Variant | None:
        """What the candidate is at this budget; None if that is out of its reach, or drops nothing though it should."""
        if not candidate.points:  # whatever the method, it is the same
            candidate = uniform(self._first, (), candidate.size)
        if candidate not in self._candidates:
            spends, build = self.spending.of(candidate.method, candidate.size), self._build(candidate)
            schedule: PruneSchedule | None = build(0.0)
            if candidate.points:
                solved = solve(build, spends, self.limit)
                schedule = None if solved == schedule else solved
            elif candidate.size == WHOLE or spends.predict(build(0.0)) > self.limit:
                schedule = None
            settings = None if schedule is None else candidate.method.settings(schedule, self._seed)
            self._candidates[candidate] = None if settings is None else Variant(settings, candidate.size)
        return self._candidates[candidate]

    def _build(self, candidate: Candidate) -> Callable[[float], PruneSchedule]:
        """Level -> schedule."""
        rectangular, stages = candidate.method.rectangular, self.stages(candidate.size)
        return partial(schedule_at, stages, candidate.points, candidate.weights, rectangular=rectangular)

    def spent(self) -> bool:
        seconds = self._limits.seconds
        return self._done >= self._limits.evaluations or (
            seconds is not None and time.monotonic() - self._started > seconds
        )

    @property
    def known(self) -> dict[Variant, Distances]:
        """Variants that were judged on all images."""
        return {each: found for (each, count), found in self._known.items() if count == len(self.searched)}

    def measured(self, variant: Variant, part: range) -> Distances:
        return self.measurements.at(variant.size).distances(variant.settings, part)

    def multiply_adds(self, variant: Variant) -> int:
        return self.measurements.at(variant.size).multiply_adds(variant.settings)
