"""The search: uniform schedules screened by successive halving, then steps from the best ones.

1. Uniform schedules at the budget: every reduction that saves work, from three layouts of points, with the paper's and
   with random scores. All on a quarter of the search images, the better quarter of them on half, the best few on all.
2. From the best: neighbours in random order, which move a point or swap the score, reduction or alignment. What is
   clearly worse on a quarter or half of the images is left there; the first that is better on all by more than the
   error of the difference is the next step. Where there is none, it goes on from the second best start.
3. The best few and the uniform default are timed as a whole, in turn with the dense model. Those that overrun a budget
   of time prune a little harder; what is slower than the dense model is out, whatever the budget is of.
4. They meet on the images held back. Of those that are clearly better there than the default, by a t test, the best is
   chosen, or else the default: few images find no more than what they can show.

Candidates are compared by `soft_divergence`, image by image.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import torch

from ssmprune_cli.errors import SsmpruneError
from ssmprune_cli.pruning import (
    Method,
    PruneSchedule,
    PruneSettings,
    choose_alignment,
    clearly_less,
    default_points,
    paired,
)
from ssmprune_cli.workflows.trials import (
    Budget,
    Candidate,
    Clock,
    Costs,
    Distances,
    Measurements,
    Spending,
    Timing,
    layouts,
    neighbours,
    schedule_at,
    solve,
    uniform,
)

FINALISTS = 6
_STARTS = 3
_TIMINGS = 4  # of finalists that overrun a time, each time pruning harder
_TIMING_SECONDS = 8.0  # for each of them, all finalists together
_WIDE = 1.2  # first candidates for each evaluation: three tenths of the evaluations, on a quarter of the images

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Trial:
    """What was tried.

    multiply_adds  share of the dense model's
    divergence     in nats on the search images (all of them), and for finalists on those held back
    timing         of finalists, beside the dense model
    """

    settings: PruneSettings
    multiply_adds: float
    divergence: float
    held_back: float | None = None
    chosen: bool = False
    timing: Timing | None = None


@dataclass(frozen=True)
class Limits:
    """evaluations: of candidates on all search images, or as many on parts of them; seconds: None is no limit.

    The finalists are always measured.
    """

    evaluations: int = 200
    seconds: float | None = None


class Search:
    """One search for the least divergence within a budget.

    budget  a share of the dense multiply-adds or of the dense time
    parts   the images searched on, and those held back
    """

    def __init__(
        self,
        measurements: Measurements,
        methods: Sequence[Method],
        budget: Budget,
        parts: tuple[range, range],
        *,
        costs: Costs,
        clock: Clock,
        seed: int = 0,
        limits: Limits = Limits(),
        progress: Progress | None = None,
    ) -> None:
        self._measurements = measurements
        self._methods = list(methods)
        self._costs, self._clock = costs, clock
        self._timed = budget.kind == "time"
        self._spending: Spending = clock if self._timed else costs
        self._limit = budget.value if self._timed else budget.value * measurements.dense_cost
        self._searched, self._held_back = parts
        count = len(self._searched)
        self._rungs = sorted({max(1, count // 4), max(1, count // 2), count})
        self._seed = seed
        self._limits = limits
        self._progress = progress
        self._known: dict[PruneSettings, Distances] = {}  # on the first search images
        self._candidates: dict[Candidate, PruneSettings | None] = {}
        self._successor: dict[PruneSettings, PruneSettings] = {}  # to what pruned harder in its place
        self._done = 0.0
        self._started = time.monotonic()

    def run(self) -> list[Trial]:
        """Every trial, the chosen one first, then by rising divergence. Raises SsmpruneError if nothing worked."""
        default = self._default()
        for start in self._start():
            self._climb(start)
        return self._choose(default)

    def _default(self) -> PruneSettings | None:
        """What `compress` does when nothing else is asked for, at this budget; None if that is not to be had."""
        method = Method(alignment=choose_alignment("auto", Method().reduction, calibrated=True))
        if method not in self._methods:
            return None
        settings = self._settings(uniform(method, default_points(self._measurements.model.stages)))
        if settings is not None:
            self._distances(settings)
        return settings

    def _start(self) -> list[Candidate]:
        """The best few uniform candidates, the best one first."""
        candidates = list(self._wide())
        keep = max(_STARTS, len(candidates) // 4)
        for count, left in zip(self._rungs, (keep, max(_STARTS, keep // 3), _STARTS), strict=False):
            candidates = self._best(candidates, count, left)
        return candidates

    def _wide(self) -> Iterator[Candidate]:
        """As many uniform candidates within the budget as the evaluations allow."""
        first: dict[tuple[str, str], Method] = {}
        usual = Method().importance
        for method in sorted(self._methods, key=lambda each: (not _usually_aligned(each), each.importance != usual)):
            first.setdefault((method.reduction, "random" if method.importance == "random" else ""), method)
        places = layouts(self._measurements.model.stages)
        every = (uniform(method, points) for points in places for method in first.values())
        left = round(_WIDE * self._limits.evaluations)
        found: dict[tuple[str, str], int] = {}
        for candidate in every:
            if found and self._spent():
                return
            key = (candidate.method.reduction, candidate.method.importance)
            if left and found.get(key, 0) < 3 and self._settings(candidate) is not None:
                found[key] = found.get(key, 0) + 1
                left -= 1
                yield candidate

    def _best(self, candidates: Iterable[Candidate], count: int, left: int) -> list[Candidate]:
        """The best `left` by their distance on the first `count` search images."""
        scored: list[tuple[float, Candidate]] = []
        for candidate in candidates:
            if self._spent() and scored:
                break
            settings = self._settings(candidate)
            if settings is not None:
                scored.append((float(self._distances(settings, count).soft.mean()), candidate))
        scored.sort(key=lambda pair: pair[0])
        return [candidate for value, candidate in scored[:left] if math.isfinite(value)]

    def _climb(self, leader: Candidate) -> None:
        choice, stages = random.Random(self._seed), self._measurements.model.stages
        improved = True
        while improved:
            improved = False
            around = [*neighbours(leader, stages), *self._swaps(leader)]
            choice.shuffle(around)
            for candidate in around:
                if self._spent():
                    return
                if self._better(candidate, leader):
                    leader, improved = candidate, True
                    break

    def _swaps(self, candidate: Candidate) -> Iterator[Candidate]:
        """The same points with another score or alignment, or with another reduction as that is usually aligned."""
        method = candidate.method
        for other in self._methods:
            same = [getattr(method, name) == getattr(other, name) for name in ("importance", "reduction", "alignment")]
            if same.count(False) == 1 or (same[0] and not same[1] and _usually_aligned(other)):
                yield replace(candidate, method=other)

    def _better(self, candidate: Candidate, leader: Candidate) -> bool:
        """Whether `candidate` is better than `leader` on the search images by more than the error of the difference."""
        found, known = self._settings(candidate), self._settings(leader)
        if found is None or known is None or found == known:
            return False
        for count in self._rungs:
            mean, error = paired(self._distances(found, count).soft, self._distances(known, count).soft)
            if mean > error or not math.isfinite(mean):
                return False
        return mean < -error

    def _choose(self, default: PruneSettings | None) -> list[Trial]:
        whole = {each: found for each, found in self._known.items() if len(found.nats) == len(self._searched)}
        ranked = sorted(whole, key=lambda each: float(whole[each].soft.mean()))
        ranked = [each for each in ranked if bool(whole[each].soft.isfinite().all())]
        finalists = list(islice(ranked if self._timed else filter(self._affordable, ranked), FINALISTS))
        if not finalists:
            raise SsmpruneError(
                "no candidate within the budget gave finite logits",
                hint="Try a larger budget, or `ssmprune inspect` for the weights.",
            )
        if default in ranked and default not in finalists:
            finalists.append(default)
        timings = self._in_time(finalists)
        finalists = list(timings)
        default = default if default is None else self._successor.get(default, default)
        whole |= {each: self._distances(each) for each in finalists}
        held_back = {each: self._measurements.distances(each, self._held_back) for each in finalists}

        def over_all(settings: PruneSettings) -> float:
            return float(torch.cat((whole[settings].soft, held_back[settings].soft)).sqrt().mean())

        def is_better(settings: PruneSettings) -> bool:
            if default not in held_back:
                return True
            found, reference = held_back[settings], held_back[default]
            # Roots, so that one image far off does not hide what all others show; the plain mean has to agree.
            less = clearly_less(found.soft.sqrt(), reference.soft.sqrt())
            return settings == default or (less and bool(found.nats.mean() < reference.nats.mean()))

        winner = next(filter(is_better, sorted(finalists, key=over_all)), default)
        trials = [
            self._trial(each, whole[each], held_back.get(each), each == winner, timings.get(each)) for each in whole
        ]
        return sorted(trials, key=lambda trial: (not trial.chosen, trial.held_back is None, trial.divergence))

    def _affordable(self, settings: PruneSettings) -> bool:
        """Whether `count_flops` agrees with the cost model that a budget of multiply-adds is met."""
        return self._measurements.multiply_adds(settings) <= self._limit * (1 + 1e-6)

    def _in_time(self, finalists: Sequence[PruneSettings]) -> dict[PruneSettings, Timing]:
        """The finalists that are within the budget and not slower than the dense model, by the clock.

        Where the budget is a time and none is within it after all tries, the quickest alone. Raises SsmpruneError if
        all are slower than the dense model.
        """
        kept: dict[PruneSettings, Timing] = {}
        waiting = list(dict.fromkeys(finalists))
        for _ in range(_TIMINGS if self._timed else 1):
            timings = dict(zip(waiting, self._clock.timings(waiting, _TIMING_SECONDS), strict=True))
            over = {each: timing for each, timing in timings.items() if self._timed and timing.ratio > self._limit}
            kept |= {each: timing for each, timing in timings.items() if each not in over}
            waiting = [harder for each, timing in over.items() if (harder := self._harder(each, timing)) is not None]
            if not waiting:
                break
        if not kept and self._timed:
            kept = dict([min(over.items(), key=lambda pair: pair[1].ratio)])
        faster = {each: timing for each, timing in kept.items() if timing.interval[0] <= 1}
        if not faster:
            quickest = min(timing.ratio for timing in kept.values())
            raise SsmpruneError(
                f"all candidates are slower than the dense model on this device with a batch of "
                f"{self._clock.batch_size}: the quickest takes {quickest:.2f} times its time",
                hint="Try a larger `--batch-size`, or a smaller target; a small model may gain nothing by pruning.",
            )
        return faster

    def _harder(self, settings: PruneSettings, timing: Timing) -> PruneSettings | None:
        """The same candidate with fewer tokens, by as much as it overran the budget; None if there is none."""
        candidate = next(each for each, solved in self._candidates.items() if solved == settings)
        model = self._clock.of(candidate.method)
        predicted = model.predict(settings.schedule)
        limit = predicted * 0.99 * self._limit / timing.ratio
        schedule = solve(self._build(candidate), model, limit)
        harder = None if schedule is None else candidate.method.settings(schedule, self._seed)
        if harder is None or harder == settings:
            return None
        self._candidates[candidate] = harder
        self._successor = {each: harder if last == settings else last for each, last in self._successor.items()}
        self._successor[settings] = harder
        return harder

    def _trial(
        self,
        settings: PruneSettings,
        searched: Distances,
        held_back: Distances | None,
        chosen: bool,
        timing: Timing | None,
    ) -> Trial:
        if held_back is None:
            cost = self._costs.of(_method(settings)).predict(settings.schedule)
        else:
            cost = self._measurements.multiply_adds(settings)
        return Trial(
            settings,
            cost / self._measurements.dense_cost,
            float(searched.nats.mean()),
            None if held_back is None else float(held_back.nats.mean()),
            chosen,
            timing,
        )

    def _distances(self, settings: PruneSettings, count: int | None = None) -> Distances:
        """On the first `count` search images, by default on all."""
        count = len(self._searched) if count is None else count
        known = self._known.get(settings)
        start = 0 if known is None else len(known.nats)
        if start < count:
            first = self._searched.start
            more = self._measurements.distances(settings, range(first + start, first + count))
            known = more if known is None else Distances(*map(torch.cat, zip(known, more, strict=True)))
            self._known[settings] = known
            self._done += (count - start) / len(self._searched)
            if self._progress:
                self._progress(min(round(self._done), self._limits.evaluations), self._limits.evaluations)
        assert known is not None
        return Distances(known.nats[:count], known.soft[:count])

    def _settings(self, candidate: Candidate) -> PruneSettings | None:
        """What the candidate is at this budget; None if that is out of its reach."""
        if candidate not in self._candidates:
            schedule = solve(self._build(candidate), self._spending.of(candidate.method), self._limit)
            self._candidates[candidate] = None if schedule is None else candidate.method.settings(schedule, self._seed)
        return self._candidates[candidate]

    def _build(self, candidate: Candidate) -> Callable[[float], PruneSchedule]:
        """Level -> schedule."""
        return partial(schedule_at, self._measurements.model.stages, candidate.points, candidate.weights)

    def _spent(self) -> bool:
        seconds = self._limits.seconds
        return self._done >= self._limits.evaluations or (
            seconds is not None and time.monotonic() - self._started > seconds
        )


def _method(settings: PruneSettings) -> Method:
    return Method(settings.importance, settings.reduction, settings.alignment)


def _usually_aligned(method: Method) -> bool:
    return method.alignment == choose_alignment("auto", method.reduction, calibrated=True)


def split(count: int) -> tuple[range, range]:
    """Numbers of the images to search on, and of those that are held back."""
    searched = count - max(1, count // 2 if count < 64 else count * 2 // 5)
    return range(searched), range(searched, count)
