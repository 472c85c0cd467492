"""The fastest model within a loss: which one of the ladder it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from ssmprune_cli.errors import BudgetError, DataError
from ssmprune_cli.pruning import Method
from ssmprune_cli.recipe import Pruning, Recipe
from ssmprune_cli.tasks import TASKS
from ssmprune_cli.workflows.compress import CompressRequest, compress_checkpoint
from ssmprune_cli.workflows.compress.fastest import LADDER, fastest
from ssmprune_cli.workflows.compress.make import Made, make
from ssmprune_cli.workflows.limits import Limits as MaxDrop
from ssmprune_cli.workflows.search import Found, Limits, SearchPlan
from ssmprune_cli.workflows.source import Source
from ssmprune_cli.workflows.trials import Budget


class Searches:
    """Finds something for every share of at least `reach`, and notes what was asked."""

    def __init__(self, reach: float = 0.0) -> None:
        self.plan = SearchPlan(Path("calib"), [Method()], limits=Limits(30))
        self.reach = reach
        self.asked: list[tuple[float, int]] = []
        self.found: Callable[[float], Pruning] = lambda share: Pruning(keep=share)

    def find(self, budget: Budget, limits: Limits) -> Found:
        if budget.value < self.reach:
            raise BudgetError("cannot be reached")
        self.asked.append((budget.value, limits.evaluations))
        return Found(budget, [], Recipe(pruning=self.found(budget.value)))


@pytest.mark.parametrize(
    ("holds_from", "reach", "chosen"), [(0.7, 0.0, 0.7), (0.0, 0.5, 0.5), (0.0, 0.0, LADDER[-1]), (0.97, 0.0, 0.95)]
)
def test_the_last_before_the_first_that_fails(holds_from: float, reach: float, chosen: float) -> None:
    searches = Searches(reach)
    judged: list[float] = []

    def holds(found: Found) -> bool:
        judged.append(found.budget.value)
        return found.budget.value >= holds_from

    assert fastest(cast(Any, searches), holds).budget.value == chosen
    assert judged == list(LADDER[: len(judged)]), "from the mildest on, none left out"
    assert sum(value < holds_from for value in judged) <= 1, "none is judged after the first that fails"
    assert {evaluations for _, evaluations in searches.asked} == {10}


def test_what_is_quick_enough_for_several_rungs_is_judged_once() -> None:
    searches, judged = Searches(), list[float]()
    searches.found = lambda share: Pruning(keep=share if share < 0.8 else 0.9)

    def holds(found: Found) -> bool:
        judged.append(found.budget.value)
        return found.budget.value >= 0.7

    assert fastest(cast(Any, searches), holds).budget.value == 0.7
    assert judged == [0.95, 0.75, 0.7, 0.65]


def test_what_nothing_can_reach_is_an_error() -> None:
    with pytest.raises(BudgetError, match="cannot be reached"):
        fastest(cast(Any, Searches(reach=0.99)), lambda found: True)


def test_another_error_is_not_taken_for_the_end_of_the_ladder() -> None:
    class Broken(Searches):
        def find(self, budget: Budget, limits: Limits) -> Found:
            if budget.value < 0.8:
                raise DataError("an image cannot be read")
            return super().find(budget, limits)

    with pytest.raises(DataError, match="cannot be read"):
        fastest(cast(Any, Broken()), lambda found: True)


@pytest.mark.usefixtures("without_noise")
def test_a_loss_that_nobody_can_keep_gives_the_nearest_model_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody loses less than nothing."""
    recipes = []

    def noted(request: CompressRequest, recipe: Recipe, *rest: Any) -> Made:
        recipes.append(recipe)
        return make(request, recipe, *rest)

    monkeypatch.setattr("ssmprune_cli.workflows.compress.run.make", noted)
    monkeypatch.setattr(type(TASKS.get("classification")), "calibrates", 9)
    pixels = np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels, labels=np.arange(12) % 10)
    request = CompressRequest(
        Source(Path(__file__).parent / "golden" / "containers" / "vim_like.pth"),
        importance="clip",
        reduction="drop",
        alignment="none",
        evaluations=5,
        keep_image_size=True,
        calib=tmp_path / "images.npz",
        data=tmp_path / "images.npz",
        dataset="npz",
        limits=MaxDrop(max_drop=-100),
        out=tmp_path / "out",
        samples=0,
    )
    report = compress_checkpoint(request).report
    judged, delivered = recipes
    assert judged == delivered and judged.calibration.images == 9, "what is judged is what is delivered"
    assert report.target is not None and report.target.kind == "max_drop" and not report.target.met
    (limit,) = report.limits
    assert not limit.holds and "--max-drop allows -100" in limit.statement
    assert report.search is not None and {trial.budget for trial in report.search} == {LADDER[0]}
    assert (tmp_path / "out" / "model.safetensors").is_file()
