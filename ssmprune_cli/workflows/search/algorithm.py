"""The search: uniform schedules of every method by successive halving, then steps from the best ones.

1. Every reduction that saves work, pruning uniformly at the budget, on a quarter of the search images; the better half
   on half of them; the best three on all, from several layouts of points.
2. The other scores, then the other alignments, for the best two.
3. From the best: all neighbours in random order; the first that is better is taken. At the end, from the second best.
4. The best few, and the uniform default, meet on the images held back: the best there is chosen.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ssmprune_cli.errors import SsmpruneError
from ssmprune_cli.pruning import PruneSettings, choose_alignment, default_points
from ssmprune_cli.pruning.method import Method
from ssmprune_cli.workflows.search.candidates import Candidate, layouts, neighbours, uniform
from ssmprune_cli.workflows.search.cost import CostModel, schedule_at, solve
from ssmprune_cli.workflows.search.measure import Measurements

FINALISTS = 6

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Trial:
    """What was tried: divergence in nats on the search images (all of them), and on those held back for finalists."""

    settings: PruneSettings
    multiply_adds: float  # fraction of dense
    divergence: float
    held_back: float | None = None
    chosen: bool = False


@dataclass(frozen=True)
class Limits:
    """evaluations: of candidates; seconds: None is no limit. The finalists are always measured."""

    evaluations: int = 200
    seconds: float | None = None


class Search:
    """One search for the least divergence within a budget.

    budget  method -> multiply-adds that it may use (the same for all, unless the budget is a time)
    parts   the images searched on, and those held back
    """

    def __init__(
        self,
        measurements: Measurements,
        methods: Sequence[Method],
        budget: Callable[[Method], float],
        parts: tuple[range, range],
        *,
        seed: int = 0,
        limits: Limits = Limits(),
        costs: dict[Method, CostModel] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._measurements = measurements
        self._methods = list(methods)
        self._budget = budget
        self._searched, self._held_back = parts
        self._seed = seed
        self._limits = limits
        self._progress = progress
        self._costs = {} if costs is None else costs
        self._trials: dict[PruneSettings, Trial] = {}
        self._settings: dict[Candidate, PruneSettings | None] = {}
        self._done = 0
        self._started = time.monotonic()

    def run(self) -> list[Trial]:
        """Every trial, the chosen one first, then by rising divergence. Raises SsmpruneError if nothing worked."""
        default = self._default()
        leaders = self._start()
        for leader in leaders:
            self._climb(leader)
        return self._choose(default)

    def _default(self) -> PruneSettings | None:
        """What `compress` does when nothing else is asked for, at this budget; None if that is not to be had."""
        reduction = Method().reduction
        method = Method(alignment=choose_alignment("auto", reduction, calibrated=True))
        if method not in self._methods:
            return None
        candidate = uniform(method, default_points(self._measurements.model.stages))
        self._mean(candidate)
        return self._resolve(candidate)

    def _start(self) -> list[Candidate]:
        """The best two uniform candidates, of different reductions where there are several."""
        places = layouts(self._measurements.model.stages)
        first: dict[str, Method] = {}
        for method in sorted(self._methods, key=_unusual):
            first.setdefault(method.reduction, method)
        uniforms = {name: [uniform(method, points) for points in places] for name, method in first.items()}
        # The default points, or where they do not save enough the first layout that does.
        arms = [found for own in uniforms.values() if (found := next(filter(self._resolve, own), None)) is not None]
        count = len(self._searched)
        for share, left in ((4, max(3, (len(arms) + 1) // 2)), (2, 3)):
            part = range(self._searched.start, self._searched.start + max(1, count // share))
            arms = self._best(arms, left, part)
        starts = [start for arm in arms for start in uniforms[arm.method.reduction]]
        best = self._best([*arms, *starts], 2, distinct=lambda candidate: candidate.method.reduction)
        for field in ("importance", "alignment"):
            others = [
                Candidate(method, leader.points, leader.weights)
                for leader in best
                for method in self._methods
                if method.reduction == leader.method.reduction and _differs_in(method, leader.method, field)
            ]
            best = self._best([*best, *others], 2, distinct=lambda candidate: candidate.method.reduction)
        return best

    def _climb(self, leader: Candidate) -> None:
        choice = random.Random(self._seed)
        best = self._mean(leader)
        improved = True
        while improved:
            improved = False
            around = list(neighbours(leader, self._measurements.model.stages))
            choice.shuffle(around)
            for candidate in around:
                if self._spent():
                    return
                found = self._mean(candidate)
                if found < best:
                    leader, best, improved = candidate, found, True
                    break

    def _choose(self, default: PruneSettings | None) -> list[Trial]:
        trials = sorted(self._trials.values(), key=lambda trial: trial.divergence)
        if not trials or not math.isfinite(trials[0].divergence):
            raise SsmpruneError(
                "no candidate within the budget gave finite logits",
                hint="Try a larger budget, or `ssmprune inspect` for the weights.",
            )
        finalists = [trial for trial in trials if math.isfinite(trial.divergence)]
        finalists = [trial for i, trial in enumerate(finalists) if i < FINALISTS or trial.settings == default]
        checked = []
        for trial in finalists:
            exact = self._measurements.multiply_adds(trial.settings)
            held_back = float(self._measurements.divergences(trial.settings, self._held_back).mean())
            checked.append(Trial(trial.settings, exact / self._measurements.dense_cost, trial.divergence, held_back))
        winner = min(checked, key=lambda trial: trial.held_back if trial.held_back is not None else math.inf)
        chosen = Trial(winner.settings, winner.multiply_adds, winner.divergence, winner.held_back, chosen=True)
        return [
            chosen,
            *(trial for trial in checked if trial is not winner),
            *(t for t in trials if t not in finalists),
        ]

    def _best(
        self,
        candidates: Iterable[Candidate],
        count: int,
        part: range | None = None,
        distinct: Callable[[Candidate], str] | None = None,
    ) -> list[Candidate]:
        """The best `count` by their divergence on `part`; of those alike by `distinct`, the best only."""
        scored: list[tuple[float, Candidate]] = []
        for candidate in dict.fromkeys(candidates):
            if self._spent() and scored:
                break
            scored.append((self._mean(candidate, part), candidate))
        scored.sort(key=lambda pair: pair[0])
        found: list[Candidate] = []
        for value, candidate in scored:
            alike = distinct is not None and distinct(candidate) in {distinct(each) for each in found}
            if math.isfinite(value) and not alike:
                found.append(candidate)
        return found[:count]

    def _mean(self, candidate: Candidate, part: range | None = None) -> float:
        """Mean divergence on `part` of the search images, by default all; infinite if the budget is out of reach."""
        settings = self._resolve(candidate)
        if settings is None:
            return math.inf
        if part is None and settings in self._trials:
            return self._trials[settings].divergence
        value = float(self._measurements.divergences(settings, part or self._searched).mean())
        self._done += 1
        if self._progress:
            self._progress(min(self._done, self._limits.evaluations), self._limits.evaluations)
        if part is None:
            cost = self._cost(candidate.method).predict(settings.schedule)
            self._trials[settings] = Trial(settings, cost / self._measurements.dense_cost, value)
        return value

    def _resolve(self, candidate: Candidate) -> PruneSettings | None:
        if candidate not in self._settings:
            stages = self._measurements.model.stages
            schedule = solve(
                lambda level: schedule_at(stages, candidate.points, candidate.weights, level),
                self._cost(candidate.method),
                self._budget(candidate.method),
            )
            self._settings[candidate] = None if schedule is None else candidate.method.settings(schedule, self._seed)
        return self._settings[candidate]

    def _cost(self, method: Method) -> CostModel:
        if method not in self._costs:
            others = [cost for known, cost in self._costs.items() if known.reduction == method.reduction]
            self._costs[method] = CostModel(self._measurements, method, others)
        return self._costs[method]

    def _spent(self) -> bool:
        seconds = self._limits.seconds
        return self._done >= self._limits.evaluations or (
            seconds is not None and time.monotonic() - self._started > seconds
        )


def _unusual(method: Method) -> bool:
    """Whether the alignment is another one than the reduction has by default."""
    return method.alignment != choose_alignment("auto", method.reduction, calibrated=True)


def _differs_in(method: Method, other: Method, field: str) -> bool:
    """Whether the two differ in `field` and nothing else."""
    fields = ("importance", "reduction", "alignment")
    return [name for name in fields if getattr(method, name) != getattr(other, name)] == [field]


def split(count: int) -> tuple[range, range]:
    """Numbers of the images to search on, and of the third that is held back."""
    searched = count - max(1, count // 3)
    return range(searched), range(searched, count)
