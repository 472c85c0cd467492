"""Limits that a user sets on a result: plain verdicts, for the report and for the exit code."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ssmprune_cli.errors import LimitError, UsageError
from ssmprune_cli.report import Judge, LimitFacts
from ssmprune_cli.tasks import TASKS, Estimate, LimitKind, Task

MAX_FLOPS = LimitKind(
    "max_flops",
    0.0,
    math.inf,
    floor=False,
    words="{value:.4f} of the dense multiply-adds are left{within}; --max-flops allows {limit:g}",
)
MAX_LATENCY_RATIO = LimitKind(
    "max_latency_ratio",
    0.0,
    math.inf,
    floor=False,
    words="a batch takes {value:.3f} times the dense model's time{within}; --max-latency-ratio allows {limit:g}",
)


# Names of the limits on what a task measures.
OF_TASKS = tuple(dict.fromkeys(each.kind.name for _, task in TASKS.items() for each in task.limits))


@dataclass(frozen=True)
class Limits:
    """None is no limit. max_drop is in points of the task's metric and may be negative: the model must then gain.

    judge  whether all of a value's 95 % interval has to keep its limit, or the estimate alone

    Raises UsageError for a bound that makes no sense.
    """

    max_drop: float | None = None
    min_accuracy: float | None = None
    min_miou: float | None = None
    max_flops: float | None = None
    max_latency_ratio: float | None = None
    judge: Judge = "interval"

    def __post_init__(self) -> None:
        kinds = [each.kind for _, task in TASKS.items() for each in task.limits]
        for kind in (*kinds, MAX_FLOPS, MAX_LATENCY_RATIO):
            bound = getattr(self, kind.name)
            if bound is not None and not (math.isfinite(bound) and kind.low <= bound <= kind.high):
                ends = f"of at least {kind.low:g}"
                if math.isfinite(kind.high):
                    ends = f"between {kind.low:g} and {kind.high:g}"
                raise UsageError(f"must be a number {ends}, not {bound:g}", where=kind.option)

    def fit(self, task: Task[Any, Any]) -> None:
        """Raises UsageError if a limit is set that is of other tasks than `task`."""
        own = [each.kind for each in task.limits]
        for name in OF_TASKS:
            if getattr(self, name) is not None and name not in [kind.name for kind in own]:
                raise UsageError(
                    f"is no limit for {task.name}, which the model is for",
                    where=f"--{name.replace('_', '-')}",
                    hint=f"Fitting ones are {', '.join(kind.option for kind in own)}.",
                )

    def require(self, names: tuple[str, ...], need: str) -> None:
        """Raises UsageError if one of `names` is set: it cannot be checked without what `need` says."""
        for name in names:
            if getattr(self, name) is not None:
                raise UsageError(f"--{name.replace('_', '-')} needs {need}")

    def check(
        self,
        task: Task[Any, Any],
        *,
        score: Any = None,
        comparison: Any = None,
        flops: float | None = None,
        latency_ratio: Estimate | None = None,
    ) -> tuple[LimitFacts, ...]:
        """A verdict for every limit that is set and whose value is known.

        score, comparison     as `task` gives them
        flops, latency_ratio  pruned over dense
        """
        measured = [(each.kind, None if score is None else each.measure(score, comparison)) for each in task.limits]
        measured += [(MAX_FLOPS, None if flops is None else Estimate(flops)), (MAX_LATENCY_RATIO, latency_ratio)]
        return tuple(
            kind.check(bound, found, self.judge)
            for kind, found in measured
            if (bound := getattr(self, kind.name)) is not None and found is not None
        )


def enforce(verdicts: tuple[LimitFacts, ...]) -> None:
    """Raises LimitError naming every limit that is broken."""
    broken = [each.statement for each in verdicts if not each.holds]
    if broken:
        raise LimitError("\n".join(broken))
