"""`ssmprune search`, and `ssmprune compress` with a target: checkpoint and images in, recipes and a trace out."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssmprune_cli.data import ImageDataset, Subset, fingerprint
from ssmprune_cli.errors import DataError, UsageError
from ssmprune_cli.models import Backbone
from ssmprune_cli.pruning import (
    ALIGNMENT_IMAGES,
    ENOUGH,
    LEAST,
    Asked,
    Method,
    is_repairable,
    judged_rows,
    repair,
    restore,
)
from ssmprune_cli.recipe import CalibrationPlan, Recipe
from ssmprune_cli.tasks import TASKS, Task
from ssmprune_cli.workflows.eight_bits import to_eight_bits
from ssmprune_cli.workflows.identity import run_identity
from ssmprune_cli.workflows.measure import machine, resolve_device
from ssmprune_cli.workflows.reporting import search_label, search_series, write_plot
from ssmprune_cli.workflows.search.algorithm import Search, split
from ssmprune_cli.workflows.search.found import Found, pruning_of
from ssmprune_cli.workflows.search.pool import Quick
from ssmprune_cli.workflows.search.sizes import Sizes
from ssmprune_cli.workflows.search.trial import Limits, Trial
from ssmprune_cli.workflows.source import Source
from ssmprune_cli.workflows.trials import (
    Budget,
    Clock,
    Costs,
    Images,
    Measurements,
    Prepared,
    SavedState,
    TimeTable,
    Timing,
    Variant,
    check_budget,
    check_time,
    in_batches,
    load_images,
    nothing_dropped,
    run,
)
from ssmprune_cli.workflows.write import check_folder, check_place, write_text

Progress = Callable[[str], Callable[[int, int], None]]

_NOISY = 0.2  # width of an interval of times, as a share of them, that tells candidates badly apart
MIN_IMAGES = 8  # fewer tell nothing, once a part of them is held back
FEW_IMAGES = 64  # with fewer the search mostly keeps the default: see docs/results.md
_ALIGNED_ON = 16  # images that calibrate a candidate's alignment; the chosen one's is calibrated on all


@dataclass(frozen=True)
class SearchPlan:
    """What to search for, and how long.

    budgets     shares of the dense multiply-adds (all scan directions counted), or of the dense model's time
    latency_ms  instead: milliseconds for a batch
    batch_size  images in a batch that is timed on `device`; None is what suits the task
    methods     those to choose from
    resize      whether smaller images are among the candidates
    cut         whether fewer blocks are, if a quick repair can refit the head: see `algorithm`
    repair      what the result is to be repaired by, on `repair_images` of the images: candidates are judged as a quick
                repair leaves them, finalists as the repair itself does, and the recipe says so
    calibration how many images, and by which seed they are chosen
    state       file that keeps what was found, so that a killed search continues; deleted at the end by the caller
    int8        all candidates have their weights in eight bits, but for the kinds of layers that the dense model on the
                search images shows to suffer: what is judged and timed is what is delivered
    """

    calib: Path
    methods: Sequence[Method]
    budgets: tuple[Budget, ...] = ()
    latency_ms: float | None = None
    resize: bool = True
    cut: bool = True
    repair: Asked = "none"
    repair_images: int = ENOUGH
    batch_size: int | None = None
    calibration: CalibrationPlan = field(default_factory=CalibrationPlan)
    seed: int = 0
    limits: Limits = field(default_factory=Limits)
    device: str = "cpu"
    state: Path | None = None
    int8: bool = False


@dataclass
class SearchResult:
    found: list[Found]
    images: int
    held_back: int
    state: SavedState
    task: Task[Any, Any]
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
        write_text(out / f"{found.budget.kind}_{found.budget.value:g}.yaml", found.recipe.to_yaml())
    write_text(out / "search.json", json.dumps([each.model_dump(mode="json") for each in trace], indent=1) + "\n")
    write_plot(
        out / "front.svg",
        search_series(trace),
        title=f"{source.path.name}: search on {result.images} images",
        x_label=search_label(trace),
        y_label=f"divergence, {result.task.unit}",
        log_y=True,
    )
    result.state.remove()
    return result


def search(source: Source, plan: SearchPlan, progress: Progress | None = None) -> SearchResult:
    """The best recipe for every budget of `plan`. Deterministic for a seed, but for what a clock decides.

    Raises UsageError for a budget that cannot be met, saying what can; DataError for images that are too few, cannot
    be read or are all alike, and for logits that are not finite.
    """
    searches = open_search(source, plan, progress)
    found = [searches.find(budget) for budget in plan.budgets]
    if plan.latency_ms is not None:
        found.append(searches.find(searches.as_share(plan.latency_ms)))
    return SearchResult(found, *searches.counts, searches.state, searches.measurements.task, searches.warnings)


def open_search(source: Source, plan: SearchPlan, progress: Progress | None = None) -> Searches:
    """What is needed to search for one budget after another. Raises as `search`."""
    model = source.load().to(resolve_device(plan.device))
    task = TASKS.get(model.task)
    if model.stages[0].frames > 1:
        plan = replace(plan, methods=[method for method in plan.methods if not method.rectangular])
    if not plan.methods:
        raise UsageError("no method of these names both saves work and fits the model, so there is nothing to search")
    timed, judged = task.at_once(8, plan.batch_size), task.at_once(plan.calibration.batch_size)
    plan = replace(plan, batch_size=timed, calibration=plan.calibration.model_copy(update={"batch_size": judged}))
    dataset = task.calibration(model, plan.calib, plan.calibration.images, plan.calibration.seed)
    if len(dataset) < MIN_IMAGES:
        raise DataError(
            f"a search needs at least {MIN_IMAGES} calibration {task.cases}, and there are {len(dataset)}",
            where=str(plan.calib),
        )
    warnings = list(dataset.notes)
    if len(dataset) < plan.calibration.images:
        warnings.append(f"Only {len(dataset)} of {plan.calibration.images} calibration {task.cases} were found.")
    if len(dataset) < FEW_IMAGES:
        warnings.append(
            f"{len(dataset)} {task.cases} are few to search on: where they cannot show that something is better, the "
            "default schedule is kept. 256 are better."
        )
    order = list(range(len(dataset)))  # by name, so perhaps by class: the part held back must not be other classes
    random.Random(plan.seed).shuffle(order)
    repairing = None
    if plan.repair != "none" and is_repairable(model):
        repairing = task.calibration(model, plan.calib, plan.repair_images, plan.calibration.seed)
        repairing = repairing if len(repairing) >= LEAST else None
    identity = {
        **run_identity(model, plan.device),
        "images": fingerprint(dataset),
        "seed": plan.seed,
        "batch_size": plan.calibration.batch_size,
        "timed_batch_size": timed,
        "machine": machine(plan.device),
        "repair_images": None if repairing is None else fingerprint(repairing),
        **({"weights": "int8"} if plan.int8 else {}),
    }
    state = SavedState(plan.state, identity)
    if state.found:
        warnings.append(f"{plan.state}: continues an earlier run, {state.found} results are known.")
    parts = split(len(dataset))
    mixed = Subset(dataset, order)
    unseen = None
    if repairing is not None:
        searched = {mixed.content(number) for number in parts[0]}
        rows = judged_rows(len(repairing)).tolist()
        unseen = torch.tensor([repairing.content(row) not in searched for row in rows])

    def load(sized: Backbone) -> Images:
        return load_images(sized, mixed)

    images = load(model)
    int8: tuple[str, ...] = ()
    if plan.int8:
        few = in_batches(images[: min(ALIGNMENT_IMAGES, len(parts[0]))], plan.calibration.batch_size)
        rounded = to_eight_bits(copy.deepcopy(model), few)
        warnings += rounded.warnings
        int8 = rounded.chosen
    measurements = Measurements(
        model,
        images,
        calibration=min(_ALIGNED_ON, len(parts[0])),
        batch_size=plan.calibration.batch_size,
        state=state,
        load=load,
        int8=int8,
    )
    warnings += [note for note in dataset.notes if note not in warnings]  # what was noticed when they were read
    clock = Clock(measurements, timed, TimeTable.of(model, plan.device, timed, int8))
    return Searches(measurements, plan, parts, Costs(measurements), clock, progress, warnings, repairing, unseen)


@dataclass
class Searches:
    """Searches on the same images, which share what they measure."""

    measurements: Measurements
    plan: SearchPlan
    parts: tuple[range, range]
    costs: Costs
    clock: Clock
    progress: Progress | None
    warnings: list[str]
    images_to_repair: ImageDataset | None = None
    unseen: Tensor | None = None  # whether those that a repair is judged on were not searched on
    _wanted: Tensor | None = field(default=None, repr=False)  # the dense model's logits of those
    _rounded: Timing | None = field(default=None, repr=False)  # of the model in eight bits with all tokens

    def repaired(self, variant: Variant) -> Tensor:
        """(n,) divergences of a repaired variant, of images that neither its repair nor the search has seen."""
        assert self.images_to_repair is not None and self.unseen is not None
        images, sized = self.images_to_repair, self.measurements.at(variant.size)

        def prepared(model: Backbone) -> Prepared:
            return Prepared(model, images, self.plan.calibration.batch_size)

        def compute() -> list[float]:
            if self._wanted is None:
                self._wanted = run(self.measurements.session, prepared(self.measurements.model))
            sized.prune(variant.settings)
            model = copy.deepcopy(sized.model)  # a repair is left in its pruner, or in its head
            restore(sized.model)
            parts = prepared(model)
            result = repair(model, parts, kind=self.plan.repair, runner=sized.delivered.with_pruner, dense=self._wanted)
            found = result.judged
            if found is None:  # there was nothing to repair
                logits = run(sized.delivered.with_pruner(model.pruner), parts)
                found = self.measurements.task.divergence(self._wanted, logits)[judged_rows(len(logits))]
            numbers: list[float] = found.tolist()
            return numbers

        key = f"repaired {self.plan.repair} {variant.size} {json.dumps(variant.settings.to_dict(), sort_keys=True)}"
        return torch.tensor(self.state.get(key, compute), dtype=torch.float64)[self.unseen]

    def _quick(self) -> Quick | None:
        if self.images_to_repair is None or len(self.parts[0]) < LEAST:
            return None
        return "head" if self.plan.repair == "head" else "head+side"

    @property
    def state(self) -> SavedState:
        return self.measurements.state

    @property
    def counts(self) -> tuple[int, int]:
        """All images, and those held back."""
        return len(self.measurements.images), len(self.parts[1])

    def as_share(self, milliseconds: float) -> Budget:
        """The share of the dense model's time that is so many ms a batch. UsageError if the dense model is as fast."""
        dense_ms = self.clock.dense_ms()
        if milliseconds >= dense_ms:
            raise UsageError(
                f"the dense model takes {dense_ms:.1f} ms a batch of {self.plan.batch_size}: {milliseconds:g} are met "
                "without pruning"
            )
        return Budget("time", milliseconds / dense_ms)

    def find(self, budget: Budget, limits: Limits | None = None) -> Found:
        """The best within `budget`. Raises UsageError if it cannot be met.

        Where eight bits alone are quick enough nothing else is looked at: no token is dropped for a time that is met.
        """
        if self.measurements.int8 and budget.kind == "time" and self._eight_bits_alone().ratio <= budget.value:
            return self._found(budget, [self._trial_of_eight_bits()], "of the dense model's time")
        cut = self.plan.cut and self._quick() is not None
        sizes = Sizes(self.measurements.model, resize=self.plan.resize, cut=cut)
        smallest = [way[-1] for way in sizes.ways if way]
        if budget.kind == "time":
            what = "of the dense model's time"
            check_time(self.clock, self.plan.methods, budget.value, smallest)
        else:
            what = "of the dense multiply-adds"
            check_budget(self.measurements, self.plan.methods, budget.value, smallest)
        trials = Search(
            self.measurements,
            self.plan.methods,
            budget,
            self.parts,
            costs=self.costs,
            clock=self.clock,
            sizes=sizes,
            repair=self.repaired if self.images_to_repair is not None else None,
            quick=self._quick(),
            seed=self.plan.seed,
            limits=limits or self.plan.limits,
            progress=self.progress(f"Searching at {budget.value:.3g} {what}") if self.progress else None,
        ).run()
        return self._found(budget, trials, what)

    def _found(self, budget: Budget, trials: list[Trial], what: str) -> Found:
        self._warn(budget, trials[0].timing)
        return Found(budget, trials, self._recipe(trials[0], f"{budget.value:.4g} {what}"))

    def _eight_bits_alone(self) -> Timing:
        if self._rounded is None:
            self._rounded = self.clock.timing(Variant(nothing_dropped()))
        return self._rounded

    def _trial_of_eight_bits(self) -> Trial:
        settings, timing = nothing_dropped(), self._eight_bits_alone()
        searched, held_back = (float(self.measurements.distances(settings, part).nats.mean()) for part in self.parts)
        return Trial(settings, timing.ratio, 1.0, searched, held_back, chosen=True, timing=timing)

    def _warn(self, budget: Budget, timing: Timing | None) -> None:
        assert timing is not None  # the chosen one was timed
        low, high = timing.interval
        batch = f"a batch of {self.clock.batch_size} on {self.plan.device}"
        if budget.kind == "time" and timing.ratio > budget.value:
            self.warnings.append(
                f"Nothing that was tried takes {budget.value:.3g} of the dense model's time for {batch}: the quickest "
                f"takes {timing.ratio:.3g}."
            )
        if high - low > _NOISY * timing.ratio:
            self.warnings.append(
                f"This machine is noisy: the time of {batch} is {low:.2f} to {high:.2f} of the dense model's (95 %). "
                "What was chosen by time may not be the best. Stop what else runs, and search again."
            )

    def _recipe(self, trial: Trial, target: str) -> Recipe:
        images = self.plan.calibration.images if self.plan.repair == "none" else self.plan.repair_images
        return Recipe(
            name="searched",
            description=f"found by search for {target}",
            pruning=pruning_of(trial, self.measurements.int8 or None, self.plan.repair),
            calibration=self.plan.calibration.model_copy(update={"images": images}),
            seed=self.plan.seed,
        )
