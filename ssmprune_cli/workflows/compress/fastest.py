"""The fastest model that provably loses no more than a limit: searches for less and less time, until one loses more.

The models of the ladder are chosen on unlabelled images, and judged on labelled ones that played no part in that. They
are judged from the mildest on, up to the first that fails: in such a fixed sequence each may be judged at the full
level, and the chance of a wrong verdict on any is that of one (Maurer, Hothorn and Lehmacher 1995).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ssmprune_cli.errors import BudgetError
from ssmprune_cli.workflows.search import Found, Searches
from ssmprune_cli.workflows.trials import Budget

LADDER = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3)
_SHARE = 3  # each rung gets this part of the evaluations: the ones before have screened the candidates


def fastest(searches: Searches, holds: Callable[[Found], bool]) -> Found:
    """The last model of the ladder before the first that does not hold; the first of all if that does not.

    holds  whether a model keeps the limit
    Raises what a search raises if not even the mildest budget can be met.
    """
    limits = searches.plan.limits
    limits = replace(limits, evaluations=max(8, limits.evaluations // _SHARE))
    best: Found | None = None
    for share in LADDER:
        try:
            rung = searches.find(Budget("time", share), limits)
        except BudgetError:
            if best is None:
                raise
            break
        if best is not None and rung.recipe.pruning == best.recipe.pruning:  # quick enough for this rung too
            continue
        if not holds(rung):
            return best or rung
        best = rung
    assert best is not None
    return best
