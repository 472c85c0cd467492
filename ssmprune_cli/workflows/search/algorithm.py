"""The search: uniform schedules screened by successive halving, then steps from the best ones.

1. Uniform schedules at the budget: every reduction that saves work, from three layouts of points, with the paper's and
   with random scores; smaller images and fewer blocks, alone and with some tokens dropped. All on a quarter of the
   search images, the better quarter of them on half, the best few on all.
2. From the best: neighbours in random order, which move a point or swap the score, reduction, alignment or size.
   What is clearly worse on a quarter or half of the images is left there; the first that is better on all by more than
   the error of the difference is the next step. Where there is none, it goes on from the second best start.
3. The best few and the uniform default are timed as a whole, in turn with the dense model. Those that overrun a budget
   of time prune a little harder; what is slower than the dense model is out, whatever the budget is of.
4. They meet on the images held back. Of those that are clearly better there than the default, by a t test, the best is
   chosen, or else the default: few images find no more than what they can show. If the result is to be repaired, each
   of them is repaired first, and judged on images that neither its repair nor the search has seen: the order of methods
   may change.

Candidates are compared by `soft_divergence`, image by image. If the result is to be repaired and there are LEAST search
images, all of them are compared as a quick repair leaves them. It is fitted to the images it is judged on, each in turn
left out, so that parts of fewer than LEAST are not looked at. Without it no block is left out: an old head is at a loss
there.
"""

from __future__ import annotations

import math
import random
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice, zip_longest
from typing import Literal

import torch
from torch import Tensor

from ssmprune_cli.errors import BudgetError, SsmpruneError
from ssmprune_cli.interface import Stage
from ssmprune_cli.models import WHOLE, Size
from ssmprune_cli.pruning import (
    LEAST,
    Method,
    PruneSchedule,
    PruneSettings,
    choose_alignment,
    clearly_less,
    default_points,
    paired,
)
from ssmprune_cli.workflows.search.sizes import Sizes, carried
from ssmprune_cli.workflows.search.trial import Limits, Trial
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
    layouts,
    neighbours,
    schedule_at,
    solve,
    uniform,
)

FINALISTS = 6
_KINDS_MORE = 3  # finalists that are the best of their reduction or way to be smaller, but not of all
_STARTS = 3
_SIZES = 4  # smaller models of each way from which tokens are dropped too
_BESIDE = ("drop", "context", "local-merge", "pool")  # reductions that are tried beside a smaller model at first
_TIMINGS = 4  # of finalists that overrun a time, each time pruning harder
_TIMING_SECONDS = 4.0  # for each of them, all finalists together
_WIDE = 1.2  # first candidates for each evaluation: three tenths of the evaluations, on a quarter of the images

Progress = Callable[[int, int], None]
Quick = Literal["head", "head+side"]


class Search:
    """One search for the least divergence within a budget.

    budget  a share of the dense multiply-adds or of the dense time
    parts   the images searched on, and those held back
    resize  whether smaller images are candidates, and `cut` whether fewer blocks are; the latter if `quick` is not None
    repair  variant -> divergences (n,) of images, the same for all, that were held back from its repair and from this
            search; None if it is not to be repaired
    quick   what a quick repair of every candidate may fit; None for none
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
        resize: bool = False,
        cut: bool = False,
        repair: Callable[[Variant], Tensor] | None = None,
        quick: Quick | None = None,
        seed: int = 0,
        limits: Limits | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._measurements = measurements
        self._methods = list(methods)
        self._costs, self._clock, self._repair = costs, clock, repair
        self._timed = budget.kind == "time"
        self._spending: Spending = clock if self._timed else costs
        self._limit = budget.value if self._timed else budget.value * measurements.dense_cost
        self._searched, self._held_back = parts
        count = len(self._searched)
        self._quick = quick if count >= LEAST else None
        least = 1 if self._quick is None else LEAST
        self._rungs = sorted({max(least, count // 4), max(least, count // 2), count})
        self._seed = seed
        self._limits = limits or Limits()
        self._progress = progress
        self._sizes = Sizes(measurements.model, resize=resize, cut=cut and self._quick is not None)
        self._known: dict[tuple[Variant, int], Distances] = {}  # on so many of the first search images
        self._candidates: dict[Candidate, Variant | None] = {}
        self._successor: dict[Variant, Variant] = {}  # to what pruned harder in its place
        self._done = 0.0
        self._started = time.monotonic()

    def run(self) -> list[Trial]:
        """Every trial, the chosen one first, then by rising divergence. Raises SsmpruneError if nothing worked."""
        default = self._default()
        for start in self._start():
            self._climb(start)
        return self._choose(default)

    def _default(self) -> Variant | None:
        """What `compress` does when nothing else is asked for, at this budget; None if that is not to be had."""
        method = Method(alignment=choose_alignment("auto", Method().reduction, calibrated=True))
        if method not in self._methods:
            return None
        variant = self._variant(uniform(method, default_points(self._measurements.model.stages)))
        if variant is not None:
            self._distances(variant)
        return variant

    def _start(self) -> list[Candidate]:
        """The best few uniform candidates, the best one first."""
        candidates = list(self._wide())
        keep = max(_STARTS, len(candidates) // 4)
        lefts = (keep, max(_STARTS, keep // 3))[: len(self._rungs) - 1]
        for count, left in zip(self._rungs, (*lefts, _STARTS), strict=True):
            ranked = self._ranked(candidates, count)
            # What a repair makes of few images says least of models without some blocks: none of a kind is left out
            # before all images were seen.
            best = {_way(each): each for each in reversed(ranked)} if count < self._rungs[-1] else {}
            candidates = [*ranked[:left], *(each for each in best.values() if each not in ranked[:left])]
        return candidates

    def _wide(self) -> Iterator[Candidate]:
        """As many uniform candidates within the budget as the evaluations allow."""
        first: dict[tuple[str, str], Method] = {}
        usual = Method().importance
        for method in sorted(self._methods, key=lambda each: (not _usually_aligned(each), each.importance != usual)):
            first.setdefault((method.reduction, "random" if method.importance == "random" else ""), method)
        stages = self._measurements.model.stages
        places = [layouts(stages, rectangular=method.rectangular) for method in first.values()]
        every = (
            uniform(method, points)
            for ranked in zip_longest(*places, fillvalue=())
            for method, points in zip(first.values(), ranked, strict=True)
            if points
        )
        quarter = len(self._searched) / (4 * self._rungs[0])  # of the first part that they are tried on
        left = round(_WIDE * self._limits.evaluations * min(1.0, quarter))
        found: dict[tuple[str, str], int] = {}
        ways = [self._smaller(list(first.values()), way) for way in self._sizes.ways]
        taken = (each for pair in zip_longest(*ways) for each in pair if each is not None)
        smaller = list(islice(taken, left // 2))
        yield from smaller
        left -= len(smaller)
        for candidate in every:
            if found and self._spent():
                return
            key = (candidate.method.reduction, candidate.method.importance)
            if left and found.get(key, 0) < 3 and self._variant(candidate) is not None:
                found[key] = found.get(key, 0) + 1
                left -= 1
                yield candidate

    def _smaller(self, methods: Sequence[Method], way: Sequence[Size]) -> Iterator[Candidate]:
        """Of `way`, the largest model within the budget; larger ones with tokens dropped, the nearest to it first."""
        alone = [uniform(methods[0], (), size) for size in way]
        fitting = bisect_left(alone, True, key=lambda each: self._variant(each) is not None)
        yield from alone[fitting : fitting + 1]
        larger = way[max(0, fitting - _SIZES) : fitting][::-1]
        usual = [method for method in methods if method.reduction in _BESIDE and method.importance != "random"]
        for layout in (0, 4, 5):
            for size in larger:
                places = layouts(self._stages(size))
                for method in usual if layout < len(places) else []:
                    candidate = uniform(method, places[layout], size)
                    if self._variant(candidate) is not None:
                        yield candidate

    def _ranked(self, candidates: Iterable[Candidate], count: int) -> list[Candidate]:
        """By their distance on the first `count` search images, the best one first."""
        scored: list[tuple[float, Candidate]] = []
        for candidate in candidates:
            if self._spent() and scored:
                break
            variant = self._variant(candidate)
            if variant is not None:
                scored.append((float(self._distances(variant, count).soft.mean()), candidate))
        scored.sort(key=lambda pair: pair[0])
        return [candidate for value, candidate in scored if math.isfinite(value)]

    def _climb(self, leader: Candidate) -> None:
        choice = random.Random(self._seed)
        improved = True
        while improved:
            improved = False
            around = [*neighbours(leader, self._stages(leader.size)), *self._swaps(leader), *self._resized(leader)]
            choice.shuffle(around)
            for candidate in around:
                if self._spent():
                    return
                if self._better(candidate, leader):
                    leader, improved = candidate, True
                    break

    def _swaps(self, candidate: Candidate) -> Iterator[Candidate]:
        """The same points with another score or alignment, or with another reduction as that is usually aligned; none
        without points, where a method does nothing."""
        if not candidate.points:
            return
        method = candidate.method
        at_ends = {stage.start for stage in self._stages(candidate.size)} & set(candidate.points)
        for other in self._methods:
            if at_ends and not other.rectangular:
                continue
            same = [getattr(method, name) == getattr(other, name) for name in ("importance", "reduction", "alignment")]
            scored = same[0] or other.rectangular  # which goes by no score
            if same.count(False) == 1 or (scored and not same[1] and _usually_aligned(other)):
                yield replace(candidate, method=other)

    def _resized(self, candidate: Candidate) -> Iterator[Candidate]:
        """The same of the next larger and smaller sizes; from larger ones it has to drop tokens, if it did not."""
        for size in self._sizes.beside(candidate.size):
            stages = self._stages(size)
            yield carried(candidate, size, self._stages(candidate.size), stages)
            if not candidate.points:
                for points in layouts(stages, rectangular=candidate.method.rectangular):
                    yield uniform(candidate.method, points, size)

    def _stages(self, size: Size) -> Sequence[Stage]:
        return self._measurements.at(size).model.stages

    def _better(self, candidate: Candidate, leader: Candidate) -> bool:
        """Whether `candidate` is better than `leader` on the search images by more than the error of the difference."""
        found, known = self._variant(candidate), self._variant(leader)
        if found is None or known is None or found == known:
            return False
        for count in self._rungs:
            mean, error = paired(self._distances(found, count).soft, self._distances(known, count).soft)
            if mean > error or not math.isfinite(mean):
                return False
        return mean < -error

    def _choose(self, default: Variant | None) -> list[Trial]:
        whole = {each: found for (each, count), found in self._known.items() if count == len(self._searched)}
        ranked = sorted(whole, key=lambda each: float(whole[each].soft.mean()))
        ranked = [each for each in ranked if bool(whole[each].soft.isfinite().all())]
        finalists = list(self._finalists(ranked))
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
        held_back = {each: self._measured(each, self._held_back) for each in finalists}
        repaired = {} if self._repair is None else {each: self._repair(each) for each in finalists}

        def over_all(variant: Variant) -> float:
            if repaired:
                return float(repaired[variant].sqrt().mean())
            return float(torch.cat((whole[variant].soft, held_back[variant].soft)).sqrt().mean())

        def is_better(variant: Variant) -> bool:
            if default not in held_back:
                return True
            if repaired:
                ours, theirs = repaired[variant], repaired[default]
                return variant == default or (
                    clearly_less(ours.sqrt(), theirs.sqrt()) and bool(ours.mean() < theirs.mean())
                )
            found, reference = held_back[variant], held_back[default]
            # Roots, so that one image far off does not hide what all others show; the plain mean has to agree.
            less = clearly_less(found.soft.sqrt(), reference.soft.sqrt())
            return variant == default or (less and bool(found.nats.mean() < reference.nats.mean()))

        winner = next(filter(is_better, sorted(finalists, key=over_all)), default)
        trials = [
            replace(
                self._trial(each, whole[each], held_back.get(each), each == winner, timings.get(each)),
                repaired=float(repaired[each].mean()) if each in repaired else None,
            )
            for each in whole
        ]
        return sorted(trials, key=lambda trial: (not trial.chosen, trial.held_back is None, trial.divergence))

    def _finalists(self, ranked: Iterable[Variant]) -> Iterator[Variant]:
        """The best few, and some that are the best of their kind: the order may change once they are repaired."""
        kinds: set[tuple[str, bool, bool]] = set()
        count = 0
        most = FINALISTS if self._repair is None else FINALISTS + _KINDS_MORE
        for variant in ranked:
            if count == most:
                return
            reduction = variant.settings.reduction if variant.settings.schedule.points else ""
            kind = (reduction, variant.size.side is not None, variant.size.cut > 0)
            # Counting multiply-adds takes as long as trying a few images: only of what would be a finalist.
            if (count < FINALISTS or kind not in kinds) and (self._timed or self._affordable(variant)):
                kinds.add(kind)
                count += 1
                yield variant

    def _affordable(self, variant: Variant) -> bool:
        """Whether `count_flops` agrees with the cost model that a budget of multiply-adds is met."""
        return self._multiply_adds(variant) <= self._limit * (1 + 1e-6)

    def _multiply_adds(self, variant: Variant) -> int:
        return self._measurements.at(variant.size).multiply_adds(variant.settings)

    def _measured(self, variant: Variant, part: range) -> Distances:
        return self._measurements.at(variant.size).distances(variant.settings, part)

    def _in_time(self, finalists: Sequence[Variant]) -> dict[Variant, Timing]:
        """The finalists that are within the budget and not slower than the dense model, by the clock.

        Where the budget is a time and none is within it after all tries, the quickest alone. Those that only may be
        slower than the dense model are out too, if there is another. Raises BudgetError if all are slower.
        """
        kept: dict[Variant, Timing] = {}
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
        faster = {each: timing for each, timing in kept.items() if timing.ratio < 1}
        faster = faster or {each: timing for each, timing in kept.items() if timing.interval[0] <= 1}
        if not faster:
            quickest = min(timing.ratio for timing in kept.values())
            raise BudgetError(
                f"all candidates are slower than the dense model on this device with a batch of "
                f"{self._clock.batch_size}: the quickest takes {quickest:.2f} times its time",
                hint="Try a larger `--batch-size`, or a smaller target; a small model may gain nothing by pruning.",
            )
        return faster

    def _harder(self, variant: Variant, timing: Timing) -> Variant | None:
        """The same candidate with fewer tokens, by as much as it overran the budget; None if there is none."""
        candidate = next(each for each, solved in self._candidates.items() if solved == variant)
        model = self._clock.of(candidate.method, candidate.size)
        limit = model.predict(variant.settings.schedule) * 0.99 * self._limit / timing.ratio
        schedule = solve(self._build(candidate), model, limit)
        harder = None if schedule is None else Variant(candidate.method.settings(schedule, self._seed), candidate.size)
        if harder is None or harder == variant:
            return None
        self._candidates[candidate] = harder
        self._successor = {each: harder if last == variant else last for each, last in self._successor.items()}
        self._successor[variant] = harder
        return harder

    def _trial(
        self,
        variant: Variant,
        searched: Distances,
        held_back: Distances | None,
        chosen: bool,
        timing: Timing | None,
    ) -> Trial:
        settings = variant.settings
        predicted = self._spending.of(_method(settings), variant.size).predict(settings.schedule)
        work = None if self._timed else predicted / self._measurements.dense_cost
        spent = predicted if work is None else work
        if held_back is not None:
            work = self._multiply_adds(variant) / self._measurements.dense_cost
            spent = timing.ratio if self._timed and timing is not None else work
        return Trial(
            settings,
            spent,
            work,
            float(searched.nats.mean()),
            None if held_back is None else float(held_back.nats.mean()),
            chosen,
            timing,
            variant.size,
        )

    def _distances(self, variant: Variant, count: int | None = None) -> Distances:
        """On the first `count` search images, by default on all."""
        count = len(self._searched) if count is None else count
        if (variant, count) not in self._known:
            self._known[variant, count] = self._compared(variant, count)
            if self._progress:
                self._progress(min(round(self._done), self._limits.evaluations), self._limits.evaluations)
        return self._known[variant, count]

    def _compared(self, variant: Variant, count: int) -> Distances:
        first = self._searched.start
        if self._quick is not None:  # a fit to more images is another one: nothing of one to fewer is left
            self._done += count / len(self._searched)
            side = self._quick == "head+side"
            part = range(first, first + count)
            return self._measurements.at(variant.size).repaired(variant.settings, part, side=side)
        known = max((tried for each, tried in self._known if each == variant), default=0)
        if known > count:
            return Distances(*(each[:count] for each in self._known[variant, known]))
        self._done += (count - known) / len(self._searched)
        more = self._measured(variant, range(first + known, first + count))
        return Distances(*map(torch.cat, zip(self._known[variant, known], more, strict=True))) if known else more

    def _variant(self, candidate: Candidate) -> Variant | None:
        """What the candidate is at this budget; None if that is out of its reach, or drops nothing though it should."""
        if not candidate.points:  # whatever the method, it is the same
            candidate = uniform(self._methods[0], (), candidate.size)
        if candidate not in self._candidates:
            spends, build = self._spending.of(candidate.method, candidate.size), self._build(candidate)
            schedule: PruneSchedule | None = build(0.0)
            if candidate.points:
                solved = solve(build, spends, self._limit)
                schedule = None if solved == schedule else solved
            elif candidate.size == WHOLE or spends.predict(build(0.0)) > self._limit:
                schedule = None
            settings = None if schedule is None else candidate.method.settings(schedule, self._seed)
            self._candidates[candidate] = None if settings is None else Variant(settings, candidate.size)
        return self._candidates[candidate]

    def _build(self, candidate: Candidate) -> Callable[[float], PruneSchedule]:
        """Level -> schedule."""
        rectangular, stages = candidate.method.rectangular, self._stages(candidate.size)
        return partial(schedule_at, stages, candidate.points, candidate.weights, rectangular=rectangular)

    def _spent(self) -> bool:
        seconds = self._limits.seconds
        return self._done >= self._limits.evaluations or (
            seconds is not None and time.monotonic() - self._started > seconds
        )


def _way(candidate: Candidate) -> tuple[bool, bool, bool]:
    """How it saves: by a smaller image, fewer blocks, fewer tokens."""
    return candidate.size.side is not None, candidate.size.cut > 0, bool(candidate.points)


def _method(settings: PruneSettings) -> Method:
    return Method(settings.importance, settings.reduction, settings.alignment)


def _usually_aligned(method: Method) -> bool:
    return method.alignment == choose_alignment("auto", method.reduction, calibrated=True)


def split(count: int) -> tuple[range, range]:
    """Numbers of the images to search on, and of those that are held back."""
    searched = count - max(1, count // 2 if count < 64 else count * 2 // 5)
    return range(searched), range(searched, count)
