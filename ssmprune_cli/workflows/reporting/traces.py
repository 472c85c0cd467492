"""What a sensitivity and a search measured, as series to plot: on the command's own plot and in the report."""

from __future__ import annotations

from collections.abc import Sequence

from ssmprune_cli.report import SearchTrial, SensitivityFacts
from ssmprune_cli.workflows.reporting.plot import Series


def sensitivity_series(found: Sequence[SensitivityFacts]) -> list[Series]:
    """Divergence with its 95 % interval by prune point, a series for each keep ratio. No divergence is below 0."""
    series = []
    for keep in dict.fromkeys(each.keep for each in found):
        known = [
            (float(each.point), each.divergence, each.divergence_se or 0.0)
            for each in found
            if each.keep == keep and each.divergence is not None
        ]
        ends = [(max(0.0, value - 1.96 * error), value + 1.96 * error) for _, value, error in known]
        series.append(Series(f"keep {keep:g}", [(point, value) for point, value, _ in known], ends))
    return series


def search_series(trials: Sequence[SearchTrial]) -> list[Series]:
    """Divergence by share of the dense multiply-adds or time: all that was tried, and what was chosen by budget."""
    tried = [(each.spent, each.divergence) for each in trials if each.divergence is not None]
    chosen = [(each.spent, each.divergence) for each in trials if each.chosen and each.divergence is not None]
    return [Series("tried", tried, line=False), Series("chosen", sorted(chosen))]


def search_label(trials: Sequence[SearchTrial]) -> str:
    """What the share is of."""
    by_time = any(each.kind == "time" for each in trials)
    return "time, share of dense" if by_time else "multiply-adds, share of dense"
