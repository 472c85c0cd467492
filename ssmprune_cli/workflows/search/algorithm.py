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
   of them is repaired first, and the best is chosen on images that neither its repair nor the search has seen: the
   order of methods may change, so finalists are of several kinds.

Candidates are compared by `soft_divergence`, image by image. If the result is to be repaired and there are LEAST search
images, all of them are compared as a quick repair leaves them. It is fitted to the images it is judged on, each in turn
left out, so that parts of fewer than LEAST are not looked at. Without it no block is left out: an old head is at a loss
there.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice, zip_longest

import torch
from torch import Tensor

from ssmprune_cli.errors import BudgetError, SsmpruneError
from ssmprune_cli.models import Size
from ssmprune_cli.pruning import (
    Method,
    PruneSettings,
    choose_alignment,
    clearly_less,
    default_points,
    paired,
)
from ssmprune_cli.workflows.search.pool import Pool, Progress, Quick
from ssmprune_cli.workflows.search.sizes import Sizes, carried
from ssmprune_cli.workflows.search.trial import Limits, Trial
from ssmprune_cli.workflows.trials import (
    Budget,
    Candidate,
    Clock,
    Costs,
    Distances,
    Measurements,
    Timing,
    Variant,
    layouts,
    neighbours,
    uniform,
)

FINALISTS = 6
_KINDS_MORE = 3  # finalists that are the best of their reduction or way to be smaller, but not of all
_OF_A_KIND = 3  # finalists of one reduction and way to be smaller, where a repair may change the order
_STARTS = 3
_SIZES = 4  # smaller models of each way from which tokens are dropped too
_BESIDE = ("drop", "context", "local-merge", "pool")  # reductions that are tried beside a smaller model at first
_TIMINGS = 4  # of finalists that overrun a time, each time pruning harder
_TIMING_SECONDS = 4.0  # for each of them, all finalists together
_WIDE = 1.2  # first candidates for each evaluation: three tenths of the evaluations, on a quarter of the images


class Search:
    """One search for the least divergence within a budget.

    budget  a share of the dense multiply-adds or of the dense time
    parts   the images searched on, and those held back
    sizes   of the smaller models that are candidates
    repair  variant -> divergences (n,) of images, the same for all, that were held back from its repair and from this
            search; None if it is not to be repaired
    quick   what a quick repair of every candidate may fit, on LEAST search images at least; None for none
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
        sizes: Sizes | None = None,
        repair: Callable[[Variant], Tensor] | None = None,
        quick: Quick | None = None,
        seed: int = 0,
        limits: Limits | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._measurements = measurements
        self._methods = list(methods)
        self._clock, self._repair = clock, repair
        self._held_back = parts[1]
        self._seed = seed
        self._limits = limits or Limits()
        self._pool = Pool(
            measurements,
            self._methods,
            budget,
            parts[0],
            costs=costs,
            clock=clock,
            quick=quick,
            seed=seed,
            limits=self._limits,
            progress=progress,
        )
        self._sizes = sizes or Sizes(measurements.model, resize=False, cut=False)

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
        variant = self._pool.variant(uniform(method, default_points(self._measurements.model.stages)))
        if variant is not None:
            self._pool.distances(variant)
        return variant

    def _start(self) -> list[Candidate]:
        """The best few uniform candidates, the best one first."""
        candidates = list(self._wide())
        keep = max(_STARTS, len(candidates) // 4)
        lefts = (keep, max(_STARTS, keep // 3))[: len(self._pool.rungs) - 1]
        for count, left in zip(self._pool.rungs, (*lefts, _STARTS), strict=True):
            ranked = self._ranked(candidates, count)
            # What a repair makes of few images says least of models without some blocks: none of a kind is left out
            # before all images were seen.
            best = {_way(each): each for each in reversed(ranked)} if count < self._pool.rungs[-1] else {}
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
        quarter = len(self._pool.searched) / (4 * self._pool.rungs[0])  # of the first part that they are tried on
        left = round(_WIDE * self._limits.evaluations * min(1.0, quarter))
        found: dict[tuple[str, str], int] = {}
        ways = [self._smaller(list(first.values()), way) for way in self._sizes.ways]
        taken = (each for pair in zip_longest(*ways) for each in pair if each is not None)
        smaller = list(islice(taken, left // 2))
        yield from smaller
        left -= len(smaller)
        for candidate in every:
            if found and self._pool.spent():
                return
            key = (candidate.method.reduction, candidate.method.importance)
            if left and found.get(key, 0) < 3 and self._pool.variant(candidate) is not None:
                found[key] = found.get(key, 0) + 1
                left -= 1
                yield candidate

    def _smaller(self, methods: Sequence[Method], way: Sequence[Size]) -> Iterator[Candidate]:
        """Of `way`, the largest model within the budget; larger ones with tokens dropped, the nearest to it first."""
        alone = [uniform(methods[0], (), size) for size in way]
        fitting = bisect_left(alone, True, key=lambda each: self._pool.variant(each) is not None)
        yield from alone[fitting : fitting + 1]
        larger = way[max(0, fitting - _SIZES) : fitting][::-1]
        usual = [method for method in methods if method.reduction in _BESIDE and method.importance != "random"]
        for layout in (0, 4, 5):
            for size in larger:
                places = layouts(self._pool.stages(size))
                for method in usual if layout < len(places) else []:
                    candidate = uniform(method, places[layout], size)
                    if self._pool.variant(candidate) is not None:
                        yield candidate

    def _ranked(self, candidates: Iterable[Candidate], count: int) -> list[Candidate]:
        """By their distance on the first `count` search images, the best one first."""
        scored: list[tuple[float, Candidate]] = []
        for candidate in candidates:
            if self._pool.spent() and scored:
                break
            variant = self._pool.variant(candidate)
            if variant is not None:
                scored.append((float(self._pool.distances(variant, count).soft.mean()), candidate))
        scored.sort(key=lambda pair: pair[0])
        return [candidate for value, candidate in scored if math.isfinite(value)]

    def _climb(self, leader: Candidate) -> None:
        choice = random.Random(self._seed)
        improved = True
        while improved:
            improved = False
            around = [*neighbours(leader, self._pool.stages(leader.size)), *self._swaps(leader), *self._resized(leader)]
            choice.shuffle(around)
            for candidate in around:
                if self._pool.spent():
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
        at_ends = {stage.start for stage in self._pool.stages(candidate.size)} & set(candidate.points)
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
            stages = self._pool.stages(size)
            yield carried(candidate, size, self._pool.stages(candidate.size), stages)
            if not candidate.points:
                for points in layouts(stages, rectangular=candidate.method.rectangular):
                    yield uniform(candidate.method, points, size)

    def _better(self, candidate: Candidate, leader: Candidate) -> bool:
        """Whether `candidate` is better than `leader` on the search images by more than the error of the difference."""
        found, known = self._pool.variant(candidate), self._pool.variant(leader)
        if found is None or known is None or found == known:
            return False
        for count in self._pool.rungs:
            mean, error = paired(self._pool.distances(found, count).soft, self._pool.distances(known, count).soft)
            if mean > error or not math.isfinite(mean):
                return False
        return mean < -error

    def _choose(self, default: Variant | None) -> list[Trial]:
        whole = self._pool.known
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
        default = default if default is None else self._pool.successor(default)
        whole |= {each: self._pool.distances(each) for each in finalists}
        held_back = {each: self._pool.measured(each, self._held_back) for each in finalists}
        repaired = {} if self._repair is None else {each: self._repair(each) for each in finalists}

        def over_all(variant: Variant) -> float:
            if repaired:
                return float(repaired[variant].sqrt().mean())
            return float(torch.cat((whole[variant].soft, held_back[variant].soft)).sqrt().mean())

        def is_better(variant: Variant) -> bool:
            if default not in held_back:
                return True
            if repaired:  # on images that took no part in the search: no finalist is there by luck with them
                return variant == default or bool(repaired[variant].mean() < repaired[default].mean())
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
        kinds: Counter[tuple[str, bool, bool]] = Counter()
        repaired = self._repair is not None
        most, of_a_kind = (FINALISTS + _KINDS_MORE, _OF_A_KIND) if repaired else (FINALISTS, FINALISTS)
        for variant in ranked:
            if kinds.total() == most:
                return
            reduction = variant.settings.reduction if variant.settings.schedule.points else ""
            kind = (reduction, variant.size.side is not None, variant.size.cut > 0)
            wanted = kinds[kind] < of_a_kind if kinds.total() < FINALISTS else not kinds[kind]
            # Counting multiply-adds takes as long as trying a few images: only of what would be a finalist.
            if wanted and (self._pool.timed or self._affordable(variant)):
                kinds[kind] += 1
                yield variant

    def _affordable(self, variant: Variant) -> bool:
        """Whether `count_flops` agrees with the cost model that a budget of multiply-adds is met."""
        return self._pool.multiply_adds(variant) <= self._pool.limit * (1 + 1e-6)

    def _in_time(self, finalists: Sequence[Variant]) -> dict[Variant, Timing]:
        """The finalists that are within the budget and not slower than the dense model, by the clock.

        Where the budget is a time and none is within it after all tries, the quickest alone. Those that only may be
        slower than the dense model are out too, if there is another. Raises BudgetError if all are slower.
        """
        kept: dict[Variant, Timing] = {}
        waiting = list(dict.fromkeys(finalists))
        timed, limit, harder = self._pool.timed, self._pool.limit, self._pool.harder
        for _ in range(_TIMINGS if timed else 1):
            timings = dict(zip(waiting, self._clock.timings(waiting, _TIMING_SECONDS), strict=True))
            over = {each: timing for each, timing in timings.items() if timed and timing.ratio > limit}
            kept |= {each: timing for each, timing in timings.items() if each not in over}
            waiting = [more for each, timing in over.items() if (more := harder(each, timing)) is not None]
            if not waiting:
                break
        if not kept and timed:
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

    def _trial(
        self,
        variant: Variant,
        searched: Distances,
        held_back: Distances | None,
        chosen: bool,
        timing: Timing | None,
    ) -> Trial:
        settings = variant.settings
        predicted = self._pool.spending.of(_method(settings), variant.size).predict(settings.schedule)
        work = None if self._pool.timed else predicted / self._measurements.dense_cost
        spent = predicted if work is None else work
        if held_back is not None:
            work = self._pool.multiply_adds(variant) / self._measurements.dense_cost
            spent = timing.ratio if self._pool.timed and timing is not None else work
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
