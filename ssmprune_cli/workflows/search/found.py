"""What a search comes to for one budget: a recipe, and a line of the report for everything that was tried."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ssmprune_cli.pruning import Asked, Method
from ssmprune_cli.recipe import Pruning, Recipe
from ssmprune_cli.report import SearchTrial
from ssmprune_cli.workflows.search.trial import Trial
from ssmprune_cli.workflows.trials import Budget


@dataclass(frozen=True)
class Found:
    """The result for one budget. `trials` has the chosen one first."""

    budget: Budget
    trials: list[Trial]
    recipe: Recipe

    @property
    def chosen(self) -> Trial:
        return self.trials[0]

    def trace(self) -> list[SearchTrial]:
        """Everything that was tried on all search images."""
        return [
            SearchTrial(
                kind="time" if self.budget.kind == "time" else "flops",
                budget=self.budget.value,
                spent=trial.spent,
                multiply_adds=trial.multiply_adds,
                latency_ratio=None if trial.timing is None else trial.timing.ratio,
                divergence=trial.divergence if trial.divergence < float("inf") else None,
                divergence_held_back=trial.held_back,
                divergence_repaired=trial.repaired,
                recipe=_name(trial),
                pruning=pruning_of(trial, self.recipe.pruning.int8).model_dump(mode="json", exclude_none=True),
                chosen=trial.chosen,
            )
            for trial in self.trials
        ]


def pruning_of(trial: Trial, int8: tuple[str, ...] | None, repaired: Asked = "none") -> Pruning:
    """Of a trial with these kinds of layers in eight bits; None for all weights in float."""
    settings, size = trial.settings, trial.size
    weights: Literal["float", "int8"] = "float" if int8 is None else "int8"
    if not settings.schedule.points:
        return Pruning(image_size=size.side, cut_blocks=size.cut or None, weights=weights, int8=int8, repair=repaired)
    return Pruning(
        image_size=size.side,
        cut_blocks=size.cut or None,
        weights=weights,
        int8=int8,
        points=settings.schedule.points,
        tokens=settings.schedule.tokens,
        importance=settings.importance,
        reduction=settings.reduction,
        alignment=settings.alignment,
        repair=repaired,
    )


def _name(trial: Trial) -> str:
    settings = trial.settings
    size = str(trial.size)
    if not settings.schedule.points:
        return size or "eight bits alone"
    method = Method(settings.importance, settings.reduction, settings.alignment)
    dropped = f"{method} after {', '.join(map(str, settings.schedule.points))}"
    return f"{size}, {dropped}" if size else dropped
