"""What is asked of `compress` for a user's module, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ssmprune_cli.adapt.stream import Fill
from ssmprune_cli.errors import UsageError
from ssmprune_cli.interface import Stage
from ssmprune_cli.pruning import Calibration, PruneSchedule, PruneSettings, choose_alignment

LEAST = 8  # tokens of a sequence in which places can be told apart, and dropping any is worth a thought


@dataclass(frozen=True)
class Compressed:
    """What `compress` did to a user's module.

    kinds        of mixer, with how many there are
    tokens       that enter each mixer, in the order in which they are called
    protected    positions that always stay
    fill         what stands at the places of dropped tokens: `zero`, the `mean` of the others, or the `last` value.
                 None where an Adapter makes the sequence shorter
    distances    mean distance from the dense model's answers on the calibration inputs, with each fill; "shorter" for
                 that of an Adapter
    calibration  what was seen there
    """

    kinds: dict[str, int]
    tokens: tuple[int, ...]
    protected: tuple[int, ...]
    fill: Fill | None
    distances: dict[str, float]
    calibration: Calibration


@dataclass(frozen=True)
class Request:
    """What is asked of `compress`."""

    keep: float | Sequence[float] | None
    tokens: Sequence[int] | None
    points: Sequence[int] | None
    importance: str
    reduction: str
    alignment: str
    seed: int

    def settings(self, stages: Sequence[Stage]) -> PruneSettings:
        """Raises UsageError for what does not fit the model or one another."""
        schedule = PruneSchedule.resolve(stages, points=self.points, keep=self.keep, tokens=self.tokens)
        check_points(schedule, stages)
        chosen = choose_alignment(self.alignment, self.reduction, calibrated=True)
        return PruneSettings(schedule, self.importance, self.reduction, chosen, self.seed)

    def unaligned(self) -> Request:
        """The same, where nothing is known of the steps."""
        return replace(self, alignment="none")

    def check_reduction(self, known: Sequence[str], where: str) -> None:
        """UsageError unless the reduction is one of those that are `known` in such a place."""
        if self.reduction not in known:
            raise UsageError(
                f"the reduction {self.reduction!r} needs what is not seen in {where}",
                hint=f"Known here: {', '.join(known)}.",
            )


def check_points(schedule: PruneSchedule, stages: Sequence[Stage]) -> None:
    """UsageError for a point at which the sequence is too short."""
    for stage in stages:
        for point in schedule.points:
            if stage.start < point < stage.stop and stage.num_tokens < LEAST:
                raise UsageError(
                    f"there are {stage.num_tokens} tokens there, too few to drop any: at least {LEAST}",
                    where=f"prune point {point}",
                    hint="Choose other points, or inputs of the size that the model is for.",
                )
