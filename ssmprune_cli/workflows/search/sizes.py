"""Smaller models that a search tries: for a few smaller images, or with a few of the last blocks left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ssmprune_cli.interface import Stage
from ssmprune_cli.models import WHOLE, Backbone, Size, cuts, sides
from ssmprune_cli.workflows.trials import Candidate

_MOST_SIDES = 8  # each is a model and its images in memory
_MOST_CUTS = 8  # each is a model in memory; a quarter of the blocks stays


class Sizes:
    """The sizes of each way to make `model` smaller, the largest first.

    Both ways at once are not tried: every pair of them would be one more model in memory.
    """

    def __init__(self, model: Backbone, *, resize: bool, cut: bool) -> None:
        self.sides = tuple(Size(side) for side in _thinned(sides(model), _MOST_SIDES)) if resize else ()
        possible = cuts(model) if cut else range(0)
        self.cuts = tuple(Size(cut=blocks) for blocks in _thinned(possible[: 3 * (len(possible) + 1) // 4], _MOST_CUTS))

    @property
    def ways(self) -> tuple[tuple[Size, ...], tuple[Size, ...]]:
        return self.sides, self.cuts

    def beside(self, size: Size) -> Iterator[Size]:
        """The next larger and the next smaller size in each way that `size` is in; WHOLE is the largest of all."""
        for way in self.ways:
            ladder = (WHOLE, *way)
            if size in ladder:
                place = ladder.index(size)
                yield from (*ladder[max(0, place - 1) : place], *ladder[place + 1 : place + 2])


def carried(candidate: Candidate, size: Size, before: Sequence[Stage], after: Sequence[Stage]) -> Candidate:
    """The same candidate of another size, its points as far into their stages, `after` in the place of `before`. Those
    that lie in blocks that are left out go."""
    pairs = {}
    for point, weight in zip(candidate.points, candidate.weights, strict=True):
        for old, new in zip(before, after, strict=True):
            inside = old.start < point < old.stop and new.start + point - old.start < new.stop
            if inside or point == old.start:  # a rectangular reduction prunes between stages too
                pairs[new.start + point - old.start] = weight
    return replace(candidate, points=tuple(pairs), weights=tuple(pairs.values()), size=size)


def _thinned(possible: Sequence[int], most: int) -> tuple[int, ...]:
    """At most so many, from all over."""
    count = min(most, len(possible))
    return tuple(possible[i * len(possible) // count] for i in range(count))
