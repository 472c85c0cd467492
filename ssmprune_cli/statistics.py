"""Intervals and the test for shares of right answers, and for times."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence

_Z = 1.959963984540054  # 97.5 % quantile of the normal distribution: two-sided 95 %
_DRAWS = 1000  # of the bootstrap


def wilson_interval(successes: int, count: int) -> tuple[float, float]:
    """95 % interval of a share `successes / count` by Wilson's score method (1927)."""
    share, spread = successes / count, _Z**2 / count
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    # At the ends the formula gives 0 and 1 but for rounding.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == count else centre + half)


def paired_interval(gained: int, lost: int, count: int) -> tuple[float, float]:
    """95 % interval of the difference (gained - lost) / count of two shares measured on the same `count` cases.

    gained  cases only the second is right on
    lost    cases only the first is right on

    The score method of Tango (1998, Statistics in Medicine 17:891), which stays honest when few or no cases differ.
    """
    difference = (gained - lost) / count
    low = _root(lambda delta: _score(gained, lost, count, delta) - _Z, -1.0, difference)
    high = _root(lambda delta: _score(gained, lost, count, delta) + _Z, difference, 1.0)
    return low, high


def mcnemar_p_value(gained: int, lost: int) -> float:
    """Two-sided p-value of the exact McNemar test: a binomial test of `gained` against `lost` with even odds."""
    discordant = gained + lost
    tail, term = 0, 1
    for k in range(min(gained, lost) + 1):
        tail += term
        term = term * (discordant - k) // (k + 1)
    return min(1.0, 2 * tail / (1 << discordant))  # whole numbers to the end: exact for any count


def ratio_of_medians(before: Sequence[float], after: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Median of `after` over that of `before`, measured in turns, and its 95 % interval.

    The interval is that of the percentile bootstrap over turns (Efron 1979), each a pair, by a fixed seed.
    """
    ratio = statistics.median(after) / statistics.median(before)
    draw, turns = random.Random(0), range(len(before))
    found = []
    for _ in range(_DRAWS):
        drawn = draw.choices(turns, k=len(turns))
        found.append(statistics.median(after[i] for i in drawn) / statistics.median(before[i] for i in drawn))
    found.sort()
    cut = round(0.025 * _DRAWS)
    return ratio, (min(found[cut], ratio), max(found[-1 - cut], ratio))


def _score(gained: int, lost: int, count: int, delta: float) -> float:
    """Score statistic of the hypothesis that the true difference is `delta`; falls as `delta` rises."""
    # Share of `lost` cases that is most likely under the hypothesis: a root of 2 n q^2 + b q + c.
    b = -gained - lost + (2 * count - gained + lost) * delta
    c = -lost * delta * (1 - delta)
    q = (math.sqrt(max(b * b - 8 * count * c, 0.0)) - b) / (4 * count)
    variance = count * (2 * q + delta * (1 - delta))
    deviation = gained - lost - count * delta
    if variance <= 0.0:
        return math.copysign(math.inf, deviation) if deviation else 0.0
    return deviation / math.sqrt(variance)


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a falling `function` crosses zero between `low` and `high`, by bisection."""
    for _ in range(60):
        middle = (low + high) / 2
        if function(middle) > 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2
