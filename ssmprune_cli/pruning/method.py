"""A way to prune, by its three names; how much is pruned, and where, is the schedule's business."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from ssmprune_cli.errors import UsageError
from ssmprune_cli.pruning.alignment import ALIGNMENTS
from ssmprune_cli.pruning.importance import IMPORTANCES
from ssmprune_cli.pruning.pruner import PruneSettings
from ssmprune_cli.pruning.reduction import REDUCTIONS
from ssmprune_cli.pruning.schedule import PruneSchedule


@dataclass(frozen=True)
class Method:
    """Names of the registries. Raises UsageError for an unknown name or an alignment that does not fit."""

    importance: str = "clip"
    reduction: str = "context"
    alignment: str = "none"

    def __post_init__(self) -> None:
        self.settings(PruneSchedule((), ()), 0)

    def __str__(self) -> str:
        return f"{self.importance}/{self.reduction}/{self.alignment}"

    @classmethod
    def parse(cls, text: str) -> Method:
        """The method written as importance/reduction/alignment; see `__str__`."""
        parts = text.split("/")
        if len(parts) != 3:
            raise UsageError(
                "is not importance/reduction/alignment",
                where=text,
                hint="For instance clip/drop/none or clip/context/null.",
            )
        return cls(*parts)

    @property
    def rectangular(self) -> bool:
        """Whether it leaves whole grids: what `PruneSchedule.resolve` has to know."""
        return REDUCTIONS.get(self.reduction).rectangular

    def settings(self, schedule: PruneSchedule, seed: int) -> PruneSettings:
        """This method with `schedule`."""
        return PruneSettings(schedule, self.importance, self.reduction, self.alignment, seed)


def known_methods(
    importance: str | None = None, reduction: str | None = None, alignment: str | None = None
) -> Iterator[Method]:
    """Every method that saves work and fits together, those with the given names only; baselines only by name.

    A reduction that goes by no score is there once, unless a score is given.
    """
    for score, way, source in product(
        [importance] if importance else IMPORTANCES.names(),
        [reduction] if reduction else REDUCTIONS.names(),
        [alignment] if alignment else ALIGNMENTS.names(),
    ):
        if not REDUCTIONS.get(way).shortens or (reduction is None and REDUCTIONS.get(way).baseline):
            continue
        if REDUCTIONS.get(way).rectangular and score not in (importance, Method.importance):
            continue
        try:
            yield Method(score, way, source)
        except UsageError:
            if importance and reduction and alignment:
                raise
