"""What a search tries: a method, prune points and how hard each of them prunes; the budget settles how many stay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ssmprune_cli.interface import Stage
from ssmprune_cli.models import WHOLE, Size
from ssmprune_cli.pruning import Method, default_points


@dataclass(frozen=True)
class Candidate:
    """At point i, the share exp(-level * weights[i]) of the tokens left stays; the level follows from the budget.

    Equal weights are the same keep ratio at each point. Without points no tokens are dropped.
    size  of the model that they are dropped from
    """

    method: Method
    points: tuple[int, ...]
    weights: tuple[float, ...]
    size: Size = WHOLE


def uniform(method: Method, points: Sequence[int], size: Size = WHOLE) -> Candidate:
    """The same keep ratio at each point."""
    return Candidate(method, tuple(points), (1.0,) * len(points), size)


def layouts(stages: Sequence[Stage], *, rectangular: bool = False) -> list[tuple[int, ...]]:
    """Places to start from: the default points; every block; every second; early, and late in the longest stage.

    rectangular  for a reduction that leaves whole grids, second the ends of the stages before the longest one and a
                 third of that: what is merged early is saved in all later stages
    """
    longest = max(stages, key=lambda stage: stage.stop - stage.start)
    inside = range(longest.start + 1, longest.stop)
    depth = len(inside)
    early = (*(stage.stop for stage in stages if stage.stop <= longest.start), *inside[depth // 3 : depth // 3 + 1])
    found = [
        default_points(stages),
        early if rectangular else (),
        tuple(inside),
        tuple(inside[::2]),
        tuple(inside[: max(1, depth // 4)]),
        tuple(inside[depth // 3 :: 2]),
        tuple(inside[depth // 2 : depth // 2 + 1]),
        tuple(p for stage in stages for p in range(stage.start + 1, stage.stop)),
        tuple(stage.start + 1 for stage in stages if stage.stop - stage.start > 1),  # what can save most
    ]
    return list(dict.fromkeys(points for points in found if points))


def neighbours(candidate: Candidate, stages: Sequence[Stage]) -> Iterator[Candidate]:
    """Candidates one step away: a point moved, left out or added, or pruning harder or softer than the others."""
    places = [p for stage in stages for p in range(stage.start + 1, stage.stop)]
    if candidate.method.rectangular:
        places = list(range(1, stages[-1].stop))
    points, weights = candidate.points, candidate.weights
    pairs = dict(zip(points, weights, strict=True))
    for point, weight in pairs.items():
        others = {p: w for p, w in pairs.items() if p != point}
        for step in (-2, -1, 1, 2):
            if point + step in places and point + step not in pairs:
                yield _candidate(candidate, {**others, point + step: weight})
        for factor in (0.5, 2.0):
            if others:
                yield _candidate(candidate, {**others, point: weight * factor})
        if others:
            yield _candidate(candidate, others)
    mean = sum(weights) / max(1, len(weights)) or 1.0
    for place in places:
        if place not in pairs:
            yield _candidate(candidate, {**pairs, place: mean})


def _candidate(like: Candidate, pairs: dict[int, float]) -> Candidate:
    """Weights have a mean of one, so that equal candidates compare equal."""
    mean = sum(pairs.values()) / len(pairs)
    points = tuple(sorted(pairs))
    return replace(like, points=points, weights=tuple(round(pairs[point] / mean, 6) for point in points))
