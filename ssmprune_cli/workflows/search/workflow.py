"""`ssmprune search`, and `ssmprune compress` with a target: checkpoint and images in, recipes and a trace out."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ssmprune_cli.data import Subset, calibration_images, fingerprint
from ssmprune_cli.errors import DataError, SsmpruneError, UsageError
from ssmprune_cli.pruning import Method, PruneSchedule
from ssmprune_cli.recipe import CalibrationPlan, Pruning, Recipe
from ssmprune_cli.report import SearchTrial
from ssmprune_cli.workflows.identity import run_identity
from ssmprune_cli.workflows.measure import machine, resolve_device
from ssmprune_cli.workflows.reporting import search_series, write_plot
from ssmprune_cli.workflows.search.algorithm import Limits, Search, Trial, split
from ssmprune_cli.workflows.source import Source
from ssmprune_cli.workflows.trials import (
    Costs,
    LatencyBudget,
    Measurements,
    SavedState,
    check_budget,
    check_latency,
    load_images,
)
from ssmprune_cli.workflows.write import check_folder, check_place, write_text

Progress = Callable[[str], Callable[[int, int], None]]

MIN_IMAGES = 8  # fewer tell nothing, once a part of them is held back
FEW_IMAGES = 64  # with fewer the search mostly keeps the default: see docs/results.md
_LATENCY_TRIES = 4
_ALIGNED_ON = 16  # images that calibrate a candidate's alignment; the chosen one's is calibrated on all


@dataclass(frozen=True)
class SearchPlan:
    """What to search for, and how long.

    flops       budgets: fractions of the dense multiply-adds, all scan directions counted
    latency_ms  instead: milliseconds for a batch of `batch_size` images on `device`
    methods     those to choose from
    calibration how many images, and by which seed they are chosen
    state       file that keeps what was found, so that a killed search continues; deleted at the end by the caller
    """

    calib: Path
    methods: Sequence[Method]
    flops: tuple[float, ...] = ()
    latency_ms: float | None = None
    batch_size: int = 8
    calibration: CalibrationPlan = field(default_factory=CalibrationPlan)
    seed: int = 0
    limits: Limits = field(default_factory=Limits)
    device: str = "cpu"
    state: Path | None = None


@dataclass(frozen=True)
class Found:
    """The result for one budget. `trials` has the chosen one first; `budget` is a share of dense, or milliseconds."""

    budget: float
    trials: list[Trial]
    recipe: Recipe
    latency_ms: float | None = None
    dense_latency_ms: float | None = None

    @property
    def chosen(self) -> Trial:
        return self.trials[0]

    def trace(self) -> list[SearchTrial]:
        """Everything that was tried on all search images."""
        return [
            SearchTrial(
                budget=self.budget,
                multiply_adds=trial.multiply_adds,
                divergence=trial.divergence if trial.divergence < float("inf") else None,
                divergence_held_back=trial.held_back,
                recipe=_name(trial),
                pruning=_pruning(trial).model_dump(mode="json", exclude_none=True),
                chosen=trial.chosen,
            )
            for trial in self.trials
        ]


@dataclass
class SearchResult:
    found: list[Found]
    images: int
    held_back: int
    state: SavedState
    warnings: list[str] = field(default_factory=list)


def state_file(out: Path) -> Path:
    """Where a search for `out` keeps what it has measured, unless another file is asked for."""
    return out.with_name(f"{out.name}.search-state.json")


def search_to_folder(
    source: Source, plan: SearchPlan, out: Path, *, overwrite: bool = False, progress: Progress | None = None
) -> SearchResult:
    """`search`, and in the folder `out` a recipe for each budget, search.json with all that was tried, and front.svg.

    Raises UsageError if there are files in `out`, unless they may be replaced.
    """
    check_folder(out, "--overwrite", allowed=overwrite)
    check_place(plan.state, "--state")
    if plan.state is None:
        plan = replace(plan, state=state_file(out))
    result = search(source, plan, progress)
    out.mkdir(parents=True, exist_ok=True)
    trace = [entry for found in result.found for entry in found.trace()]
    for found in result.found:
        write_text(out / f"flops_{found.budget:g}.yaml", found.recipe.to_yaml())
    write_text(out / "search.json", json.dumps([each.model_dump(mode="json") for each in trace], indent=1) + "\n")
    write_plot(
        out / "front.svg",
        search_series(trace),
        title=f"{source.path.name}: search on {result.images} images",
        x_label="multiply-adds, share of dense",
        y_label="divergence, nats",
        log_y=True,
    )
    result.state.remove()
    return result


def search(source: Source, plan: SearchPlan, progress: Progress | None = None) -> SearchResult:
    """The best recipe for every budget of `plan`. Deterministic for a seed, unless time limits or is the budget.

    Raises UsageError for a budget that cannot be met, saying what can; DataError for images that are too few, cannot
    be read or are all alike, and for logits that are not finite.
    """
    if not plan.methods:
        raise UsageError("no method of these names both saves work and fits together, so there is nothing to search")
    model = source.load().to(resolve_device(plan.device))
    dataset = calibration_images(plan.calib, plan.calibration.images, plan.calibration.seed)
    if len(dataset) < MIN_IMAGES:
        raise DataError(
            f"a search needs at least {MIN_IMAGES} calibration images, and there are {len(dataset)}",
            where=str(plan.calib),
        )
    warnings = list(dataset.notes)
    if len(dataset) < plan.calibration.images:
        warnings.append(f"Only {len(dataset)} of {plan.calibration.images} calibration images were found.")
    if len(dataset) < FEW_IMAGES:
        warnings.append(
            f"{len(dataset)} images are few to search on: where they cannot show that something is better, the default "
            "schedule is kept. 256 are better."
        )
    order = list(range(len(dataset)))  # by name, so perhaps by class: the part held back must not be other classes
    random.Random(plan.seed).shuffle(order)
    identity = {
        **run_identity(model, plan.device),
        "images": fingerprint(dataset),
        "seed": plan.seed,
        "batch_size": plan.calibration.batch_size,
        "latency_ms": plan.latency_ms,
        "machine": None if plan.latency_ms is None else machine(plan.device),
    }
    state = SavedState(plan.state, identity)
    if state.found:
        warnings.append(f"{plan.state}: continues an earlier run, {state.found} results are known.")
    parts = split(len(dataset))
    images = load_images(model, Subset(dataset, order))
    measurements = Measurements(
        model, images, calibration=min(_ALIGNED_ON, len(parts[0])), batch_size=plan.calibration.batch_size, state=state
    )
    searches = _Searches(measurements, plan, parts, Costs(measurements), progress)
    found = [searches.by_flops(fraction) for fraction in plan.flops]
    if plan.latency_ms is not None:
        found.append(searches.by_latency(plan.latency_ms))
    return SearchResult(found, len(images), len(parts[1]), state, warnings)


@dataclass
class _Searches:
    measurements: Measurements
    plan: SearchPlan
    parts: tuple[range, range]
    costs: Costs
    progress: Progress | None

    def by_flops(self, fraction: float) -> Found:
        check_budget(self.measurements, self.plan.methods, fraction)
        work = fraction * self.measurements.dense_cost
        trials = self._run(lambda method: work, f"Searching at {fraction:g}")
        return Found(fraction, trials, self._recipe(trials[0], f"{fraction:g} of the dense multiply-adds"))

    def by_latency(self, milliseconds: float) -> Found:
        budget = LatencyBudget(self.measurements, milliseconds, self.plan.batch_size, self.costs)
        stages = self.measurements.model.stages
        points = tuple(stage.start + 1 for stage in stages if stage.stop - stage.start > 1)
        check_latency(budget, milliseconds, self.plan.methods[0].settings(PruneSchedule(points, (1,) * len(points)), 0))
        for _ in range(_LATENCY_TRIES):
            trials = self._run(budget, f"Searching for {milliseconds:g} ms")
            pruned, dense = budget.measure(trials[0].settings)
            if pruned <= milliseconds:
                recipe = self._recipe(trials[0], f"{milliseconds:g} ms a batch of {self.plan.batch_size}")
                return Found(milliseconds, trials, recipe, pruned, dense)
            budget.slack *= 0.99 * milliseconds / pruned
        raise SsmpruneError(
            f"the best candidate of {_LATENCY_TRIES} tries takes {pruned:.1f} ms, not {milliseconds:g}",
            hint="The device may be busy: try again, or ask for a little more time.",
        )

    def _run(self, budget: Callable[[Method], float], title: str) -> list[Trial]:
        return Search(
            self.measurements,
            self.plan.methods,
            budget,
            self.parts,
            seed=self.plan.seed,
            limits=self.plan.limits,
            costs=self.costs,
            progress=self.progress(title) if self.progress else None,
        ).run()

    def _recipe(self, trial: Trial, target: str) -> Recipe:
        return Recipe(
            name="searched",
            description=f"found by search for {target}",
            pruning=_pruning(trial),
            calibration=self.plan.calibration,
            seed=self.plan.seed,
        )


def _pruning(trial: Trial) -> Pruning:
    settings = trial.settings
    return Pruning(
        points=settings.schedule.points,
        tokens=settings.schedule.tokens,
        importance=settings.importance,
        reduction=settings.reduction,
        alignment=settings.alignment,
    )


def _name(trial: Trial) -> str:
    settings = trial.settings
    method = Method(settings.importance, settings.reduction, settings.alignment)
    return f"{method} after {', '.join(map(str, settings.schedule.points))}"
