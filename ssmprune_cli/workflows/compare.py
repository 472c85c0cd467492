"""`ssmprune compare`: several ways to prune one checkpoint, on the same images, at equal keep ratios, cost or time."""

from __future__ import annotations

import copy
import functools
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssmprune_cli.data import Batch, ImageDataset, Subset
from ssmprune_cli.errors import DataError, UsageError
from ssmprune_cli.inference import Session, prepare
from ssmprune_cli.models import WHOLE, Backbone, Size, cuts, sides, smaller
from ssmprune_cli.pruning import (
    DEFAULT_REDUCTION,
    IMPORTANCES,
    REDUCTIONS,
    Asked,
    Method,
    PruneSettings,
    choose_alignment,
    prune,
    repair,
    restore,
)
from ssmprune_cli.recipe import Recipe
from ssmprune_cli.tasks import TASKS
from ssmprune_cli.workflows.compress import made_smaller, recipe_settings, recipe_size
from ssmprune_cli.workflows.eight_bits import to_eight_bits
from ssmprune_cli.workflows.evaluate import spread
from ssmprune_cli.workflows.measure import count_flops, interleaved_speeds, resolve_device
from ssmprune_cli.workflows.source import Source
from ssmprune_cli.workflows.trials import Budget, Images, Prepared, Uniform, in_batches, load_images, run, sampled

Progress = Callable[[str], Callable[[int, int], None]]

KEPT_BYTES = 2**30


@dataclass(frozen=True)
class Row:
    """One model on the images.

    budget               what was asked for, such as "flops 0.7"; "" for dense models and recipes
    image_size           height and width of its images; `resized_from` those of the dense model's, if they are smaller
    multiply_adds        of one image, all directions; `share` is that of the dense model
    divergence           mean KL(dense || this) in nats with its standard error; None for other dense models
    metric               that of the model's `task` with its 95 % interval, and the difference from dense with its
                         paired one; None for images that answers cannot be judged by
    speedup              median time of the dense model over this one's, timed in turns
    images_per_second    the dense model's, times `speedup`: a row says one thing, and all rows are of one moment
    """

    name: str
    task: str
    budget: str
    image_size: tuple[int, int]
    resized_from: tuple[int, int] | None
    points: tuple[int, ...]
    tokens: tuple[int, ...]
    multiply_adds: int
    share: float
    images_per_second: float
    speedup: float
    divergence: float | None
    divergence_se: float | None
    metric: float | None
    metric_interval: tuple[float, float] | None
    difference: float | None
    difference_interval: tuple[float, float] | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values; the metric is called by its own name."""
        key, values = TASKS.get(self.task).key, asdict(self)
        return {name.replace("metric", key): value for name, value in values.items() if name != "task"}


class EvaluationImages:
    """The images of a dataset, or `limit` of them (always the same, see `spread`), prepared for a model: batches on its
    device. They are read anew each time, unless they fit into `KEPT_BYTES`."""

    def __init__(self, dataset: ImageDataset, model: Backbone, limit: int | None, batch_size: int) -> None:
        if limit is not None and limit < len(dataset):
            dataset = Subset(dataset, spread(len(dataset), limit))
        self.dataset = dataset
        self._model = model
        self._batch_size = batch_size
        self._kept: list[Batch] | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Batch]:
        if self._kept is None and 4 * len(self) * math.prod(self._model.input_shape) <= KEPT_BYTES:
            self._kept = list(self._read())
        yield from self._read() if self._kept is None else self._kept

    def _read(self) -> Iterator[Batch]:
        yield from Prepared(self._model, self.dataset, self._batch_size).batches()


@dataclass(frozen=True)
class Answers:
    """Of one model to all images: what its distance from another one is computed from, (N, ...) on the CPU, and the
    results that its task keeps; none if the images cannot be judged."""

    sample: Tensor
    results: list[Any]


@dataclass(frozen=True)
class _Smaller:
    """The model of a comparison for smaller images, and the comparison's images as it sees them."""

    model: Backbone
    session: Session
    images: EvaluationImages


class Comparison:
    """One dense model, and variants of it on the same images, of which only the answers are kept. A variant drops
    tokens, sees smaller images, or both.

    judged  whether the images say what the answers are judged by
    """

    def __init__(
        self,
        source: Source,
        dataset: ImageDataset,
        *,
        limit: int | None,
        batch_size: int | None,
        device: str,
        rounds: int,
    ) -> None:
        if len(dataset) < 2:
            raise DataError("a comparison needs at least two images")
        self.device = resolve_device(device)
        self.model = source.load().to(self.device).eval()
        restore(self.model)
        self.reference = prepare(self.model)  # its variants share its weights
        self.task = TASKS.get(self.model.task)
        self.batch_size, self.rounds = self.task.at_once(64, batch_size), rounds
        self.images = EvaluationImages(dataset, self.model, limit, self.batch_size)
        self._smaller: dict[Size, _Smaller] = {}
        self.notes = list(self.task.remarks)
        self.judged = self.images.dataset.has_targets
        if self.judged:
            try:
                self.task.check(self.model, self.images.dataset)
            except DataError as error:  # all else can be compared
                self.notes.append(f"{self.task.quality.capitalize()} is left out: {error.what}.")
                self.judged = False
        self.name = source.name
        self.dense_answers = self.answers(self.name)
        self.dense_cost = self.cost()

    def dense(self) -> Row:
        speed = (self.dense_speed, 1.0)
        return self._row(self.name, "", self.model, self.dense_answers, self.dense_cost, speed, None)

    @functools.cached_property
    def dense_speed(self) -> float:
        """Images per second of the dense model."""
        (dense,) = interleaved_speeds([self.reference], self._batch(self.model), self.rounds)
        return dense.images_per_second

    def other_dense(self, source: Source, dataset: ImageDataset, limit: int | None) -> Row:
        """Another dense model on the same images, prepared its own way."""
        model = source.load().to(self.device).eval()
        restore(model)
        if self.judged:
            self.task.check(model, self.images.dataset)
        session = prepare(model)
        images = EvaluationImages(dataset, model, limit, self.batch_size)
        answers = self._answers(session, images, source.name)
        cost = count_flops(model).all_directions
        speed = self._time(session, self._batch(model))
        row = self._row(source.name, "", model, answers, cost, speed, None)
        return replace(row, divergence=None, divergence_se=None)

    def pruned(self, name: str, budget: str, settings: PruneSettings, calibration: Images | None) -> Row:
        """A variant's row."""
        self.prune(settings, calibration)
        answers = self.answers(f"{name} {budget}".strip())
        row = self._row(name, budget, self.model, answers, self.cost(), self.speed(), settings)
        restore(self.model)
        return row

    def recipe(self, recipe: Recipe, calibration: ImageDataset | None) -> Row:
        """The row of what a recipe makes, calibrated on its images where it needs any. Only a head whose last blocks
        are gone is repaired."""
        if calibration is not None and recipe.pruning.repair != "none" and not recipe.pruning.cut_blocks:
            self.notes.append(f"`compress` would repair what {recipe.name} makes; here it is not repaired.")
        if recipe.pruning.distill_steps:
            self.notes.append(f"`compress` would train what {recipe.name} makes; here it is not trained.")
        if recipe.pruning.drops_tokens and recipe.pruning.reduction == "auto":
            self.notes.append(f"{recipe.name} leaves its reduction to `compress`; here it is {DEFAULT_REDUCTION!r}.")
        if recipe.pruning.weights == "int8":
            return self._in_eight_bits(recipe, calibration)
        if recipe_size(recipe) == WHOLE:
            settings = recipe_settings(self.model, recipe, calibrated=calibration is not None)
            assert settings is not None  # else it would name a size, or was refused
            images = None if calibration is None else load_images(self.model, calibration)
            return self.pruned(recipe.name, "", settings, images)
        made_smaller(self.model, recipe)  # raises for a size that is none
        return self.smaller(recipe.name, "", recipe_size(recipe), recipe, calibration)

    def _in_eight_bits(self, recipe: Recipe, calibration: ImageDataset | None) -> Row:
        """The row of a recipe whose weights are in eight bits: made as `compress` does, first pruned, then rounded."""
        name = f"{recipe.name}, int8"
        model = made_smaller(copy.deepcopy(self.model), recipe)
        images = dense = None
        if calibration is not None:
            images = self._calibration(model, calibration)
            dense = run(self.reference, self._calibration(self.model, calibration))
        settings = recipe_settings(model, recipe, calibrated=calibration is not None)
        if settings is not None:
            self._prune(prepare(model), model, settings, images, dense)
        self.notes += to_eight_bits(model, images, recipe.pruning.int8).warnings
        if recipe.pruning.cut_blocks:
            self._refit(name, model, images, dense, recipe.pruning.repair)
        judged = self.images
        if recipe_size(recipe) != WHOLE:
            judged = EvaluationImages(self.images.dataset, model, None, self.batch_size)
        session, cost = prepare(model), count_flops(model).all_directions
        answers = self._answers(session, judged, name)
        return self._row(name, "", model, answers, cost, self._time(session, self._batch(model)), settings)

    def smaller(
        self, name: str, budget: str, size: Size, recipe: Recipe | None = None, calibration: ImageDataset | None = None
    ) -> Row:
        """The row of the model of this size, with tokens dropped as `recipe` says, if it says so. The head of one that
        was cut short is refitted on the calibration images, if there are any, unless `recipe` says not to."""
        variant = self.at(size)
        model, images, dense = variant.model, None, None
        if calibration is not None and (recipe is not None or size.cut):
            dense = run(self.reference, self._calibration(self.model, calibration))
            images = self._calibration(model, calibration)
        settings = None if recipe is None else recipe_settings(model, recipe, calibrated=calibration is not None)
        if settings is not None:
            self._prune(variant.session, model, settings, images, dense)
        session = variant.session
        if size.cut:
            self._refit(name, model, images, dense, "auto" if recipe is None else recipe.pruning.repair)
            session = prepare(model) if settings is None else session
        session = session.with_pruner(model.pruner)
        answers, cost = self._answers(session, variant.images, name), count_flops(model).all_directions
        restore(model)
        return self._row(name, budget, model, answers, cost, self._time(session, self._batch(model)), settings)

    def at(self, size: Size) -> _Smaller:
        """The model of this size, all tokens kept. Kept is one whose head no one refits."""
        if size in self._smaller:
            return self._smaller[size]
        model = smaller(self.model, size)
        images = self.images
        if size.side is not None:
            images = EvaluationImages(self.images.dataset, model, None, self.batch_size)
        made = _Smaller(model, prepare(model), images)
        if not size.cut:
            self._smaller[size] = made
        return made

    def size_for(self, sizes: Sequence[Size], budget: Budget, work: float) -> Size | None:
        """The first of `sizes`, the largest first, in the time of `budget`, or else with at most `work` multiply-adds;
        None if there is none.

        Cost and time fall with the size, so that a few of many are enough to look at.
        """

        def fits(size: Size) -> bool:
            variant = self.at(size)
            if budget.kind == "time":
                return 1 / self._time(variant.session, self._batch(variant.model))[1] <= budget.value
            return count_flops(variant.model).all_directions <= work

        place = bisect_left(sizes, True, key=fits)
        return sizes[place] if place < len(sizes) else None

    def _refit(
        self, name: str, model: Backbone, images: Sequence[Tensor] | None, dense: Tensor | None, kind: Asked
    ) -> None:
        """Fit the head of a model that was cut short to the dense model's answers, if there are images."""
        done = "none" if images is None else repair(model, images, kind=kind, dense=dense).kind
        if done == "none":
            why = "that was not clearly better" if kind != "none" else "the recipe says so"
            why = why if images is not None else "there are no calibration images"
            self.notes.append(f"The head of the model {name} is not refitted: {why}.")

    def prune(self, settings: PruneSettings, calibration: Images | None) -> None:
        """Make `model` a variant: `answers`, `cost` and `speed` are of what it is now."""
        images = None if calibration is None else in_batches(calibration, self.batch_size)
        self._prune(self.reference, self.model, settings, images, None)

    def _prune(
        self,
        session: Session,
        model: Backbone,
        settings: PruneSettings,
        images: Sequence[Tensor] | None,
        dense: Tensor | None,
    ) -> None:
        """`prune` by the task's distance; the session is one of `model`."""
        prune(model, settings, images, dense=dense, runner=sampled(session), distance=self.task.divergence)

    def answers(self, name: str) -> Answers:
        """Raises DataError, calling the model `name`, if they are not finite."""
        return self._answers(self._session(), self.images, name)

    def _answers(self, session: Session, images: EvaluationImages, name: str) -> Answers:
        samples: list[Tensor] = []
        results: list[Any] = []
        with torch.inference_mode():
            for batch in images:
                outputs = self.task.answer(session, batch.images)
                if not bool(self.task.finite(outputs).all()):
                    hint = "`ssmprune inspect` looks at the weights."
                    raise DataError(f"{name} gives logits that are not finite", hint=hint)
                samples.append(self.task.sample(outputs).cpu())
                results += self.task.results(outputs, batch) if self.judged else []
        return Answers(torch.cat(samples), results)

    def cost(self) -> int:
        """Multiply-adds of an image, all directions."""
        return count_flops(self.model).all_directions

    def speed(self) -> tuple[float, float]:
        """Images per second, and how many times as fast as the dense model."""
        return self._time(self._session(), self._batch(self.model))

    def _session(self) -> Session:
        """Of what `model` is now."""
        return self.reference.with_pruner(self.model.pruner)

    def _batch(self, model: Backbone) -> Tensor:
        return model.example(self.batch_size)

    def _calibration(self, model: Backbone, dataset: ImageDataset) -> Sequence[Tensor]:
        return in_batches(load_images(model, dataset), self.batch_size)

    def _time(self, session: Session, batch: Tensor) -> tuple[float, float]:
        models, batches_of_both = [self.reference, session], [self._batch(self.model), batch]
        dense, own = interleaved_speeds(models, batches_of_both, self.rounds)
        speedup = dense.median_ms / own.median_ms
        return self.dense_speed * speedup, speedup

    def _row(
        self,
        name: str,
        budget: str,
        model: Backbone,
        answers: Answers,
        cost: int,
        speed: tuple[float, float],
        settings: PruneSettings | None,
    ) -> Row:
        metric = change = None
        if self.judged:
            both = [each.results for each in (answers, self.dense_answers)]
            own, dense = ((each, self.task.score(each, model, self.images.dataset)) for each in both)
            metric = self.task.estimate(own[1])
            change = self.task.change(self.task.compare(own, dense, self.images.dataset))
        alike = answers.sample.shape == self.dense_answers.sample.shape
        nats = self.task.divergence(self.dense_answers.sample, answers.sample) if alike else None
        return Row(
            name=name,
            task=self.task.name,
            budget=budget,
            image_size=model.image_size,
            resized_from=model.config.resized_from,
            points=settings.schedule.points if settings else (),
            tokens=settings.schedule.tokens if settings else (),
            multiply_adds=cost,
            share=cost / self.dense_cost,
            images_per_second=speed[0],
            speedup=speed[1],
            divergence=None if nats is None else float(nats.mean()),
            divergence_se=None if nats is None else float(nats.std()) / math.sqrt(len(nats)),
            metric=metric.value if metric else None,
            metric_interval=metric.interval if metric else None,
            difference=change.value if change else None,
            difference_interval=change.interval if change else None,
        )


def compare(
    source: Source,
    dataset: ImageDataset,
    methods: Sequence[Method],
    budgets: Sequence[Budget],
    *,
    recipes: Sequence[Recipe] = (),
    others: Sequence[Source] = (),
    calib: Path | None = None,
    calib_images: int = 64,
    limit: int | None = None,
    batch_size: int | None = None,
    rounds: int = 5,
    device: str = "cpu",
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[list[Row], list[str]]:
    """Rows (the dense model first), and what a reader must know.

    methods  each at every budget, and beside them the model for smaller images and the one with fewer blocks that cost
             as much; recipes as they are; others: further dense checkpoints
    calib    unlabelled images for methods that are calibrated

    Raises UsageError for a method that needs calibration without any, DataError for logits that are not finite.
    """
    for method in methods:
        choose_alignment(method.alignment, method.reduction, calibrated=calib is not None)
    comparison = Comparison(source, dataset, limit=limit, batch_size=batch_size, device=device, rounds=rounds)
    chosen = None if calib is None else comparison.task.calibration(comparison.model, calib, calib_images, seed)
    calibration = None if chosen is None else load_images(comparison.model, chosen)
    done = progress("Comparing") if progress else None
    total = 1 + (len(methods) + 2) * len(budgets) + len(recipes) + len(others)
    rows, notes = [comparison.dense()], list(dataset.notes)

    def advance() -> None:
        if done:
            done(len(rows), total)

    for other in others:
        rows.append(comparison.other_dense(other, dataset, limit))
        advance()
    for recipe in recipes:
        rows.append(comparison.recipe(recipe, chosen))
        advance()
    seen = next(iter(comparison.images)).images[:2] if calibration is None else calibration
    uniform = Uniform(comparison.model, seen, batch_size=comparison.batch_size, seed=seed) if budgets else None
    for budget in budgets:
        assert uniform is not None
        title = f"{budget.kind} {budget.value:g}"
        for method in methods:
            settings = uniform.settings(method, budget)
            if settings is None:
                notes.append(f"{method} cannot save enough for {title}.")
                continue
            rows.append(comparison.pruned(str(method), title, settings, calibration))
            advance()
        work = budget.value * comparison.dense_cost
        if budget.kind == "keep":  # what the methods need that keep so much
            work = max((row.multiply_adds for row in rows if row.budget == title), default=0)
        rows += _smaller(comparison, budget, title, work, notes)
        advance()
        cut = comparison.size_for([Size(cut=blocks) for blocks in cuts(comparison.model)], budget, work)
        if cut is not None:
            rows.append(comparison.smaller(str(cut), title, cut, calibration=chosen))
        advance()
    return rows, [*comparison.notes, *notes]


def _smaller(comparison: Comparison, budget: Budget, title: str, work: float, notes: list[str]) -> list[Row]:
    """The row of the largest smaller image within `budget`, or that needs at most `work`; none without one."""
    size = comparison.size_for([Size(side) for side in sides(comparison.model)], budget, work)
    if size is not None:
        return [comparison.smaller("smaller image", title, size)]
    height, width = comparison.model.image_size
    why = f"half of {height} pixels costs more" if sides(comparison.model) else f"{height} x {width} cannot be resized"
    notes.append(f"There is no smaller image for {title}: {why}.")
    return []


def published_table(
    recipes: Sequence[Recipe], checkpoints: Path, family: str
) -> tuple[dict[Path, list[Recipe]], list[str]]:
    """Recipes of `family` with published numbers, by the checkpoint in `checkpoints` that they are for; what lacks one.

    Raises UsageError if there is no checkpoint for any of them.
    """
    found: dict[Path, list[Recipe]] = {}
    missing = set()
    for recipe in recipes:
        if recipe.published is None or recipe.model is None or recipe.model.family != family:
            continue
        file = checkpoints / recipe.published.checkpoint
        if (
            recipe.pruning.reduction not in ("auto", *REDUCTIONS.names())
            or recipe.pruning.importance not in IMPORTANCES.names()
        ):
            missing.add(f"{recipe.name} needs a score or reduction that this ssmprune does not have.")
            continue
        if file.exists():
            found.setdefault(file, []).append(recipe)
        else:
            missing.add(f"{recipe.published.checkpoint} is not in {checkpoints}.")
    if not found:
        raise UsageError(
            "has none of the checkpoints of the table", where=str(checkpoints), hint="\n".join(sorted(missing))
        )
    return found, sorted(missing)
