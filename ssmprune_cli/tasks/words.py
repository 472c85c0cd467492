"""Shares and their intervals in words, the same for every task."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from ssmprune_cli.report import Interval
from ssmprune_cli.tasks.task import Loss

Part = TypeVar("Part")


def in_percent(ends: Interval, form: str) -> str:
    """An interval of shares, in per cent: each end as `form` has it."""
    return " to ".join(form.format(100 * end) for end in ends)


def share(value: float, interval: Interval | None) -> str:
    """A share in per cent, with its interval if it has one."""
    within = "" if interval is None else f" ({in_percent(interval, '{:.1f}')})"
    return f"{100 * value:.2f} %{within}"


def gained(ends: Interval | None) -> bool | None:
    """Whether a difference is a gain, as far as its interval tells."""
    if ends is None:
        return None
    return True if ends[0] > 0 else False if ends[1] < 0 else None


def bootstrap(ends: Interval | None, count: int, resamples: int | None = None) -> str:
    """How the interval of a difference on `count` images came about."""
    if ends is None:
        return "one image has no interval"
    drawn = "" if resamples is None else f", {resamples:,} resamples"
    return f"95 % interval {in_percent(ends, '{:+.2f}')}; paired bootstrap over {count:,} images{drawn}"


def losses(
    pairs: Iterable[tuple[Part, Part]],
    value: Callable[[Part], float | None],
    describe: Callable[[Part], tuple[str, int]],
    form: Callable[[float], str],
    count: int,
) -> list[Loss]:
    """The `count` parts that lost most, of those that lost.

    pairs     each part for the dense and the pruned model
    value     its metric, a share; None where there is none
    describe  its name, and how many images it has
    form      a share in words
    """
    lost = [
        (after - before, before, after, pruned)
        for dense, pruned in pairs
        if (before := value(dense)) is not None and (after := value(pruned)) is not None and after < before
    ]
    return [
        Loss(*describe(pruned), form(before), form(after), f"{100 * change:+.1f} points")
        for change, before, after, pruned in sorted(lost, key=lambda each: each[0])[:count]
    ]
