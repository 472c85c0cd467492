"""`ssmprune compare`: several ways to prune one checkpoint, on the same images, at equal keep ratios, cost or time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssmprune_cli.data import batches, calibration_images
from ssmprune_cli.data.datasets import ImageDataset, Subset
from ssmprune_cli.errors import DataError, UsageError
from ssmprune_cli.models.base import Backbone
from ssmprune_cli.pruning import (
    IMPORTANCES,
    REDUCTIONS,
    PruneSchedule,
    PruneSettings,
    choose_alignment,
    compress,
    restore,
)
from ssmprune_cli.pruning.divergence import divergence
from ssmprune_cli.pruning.method import Method
from ssmprune_cli.recipe import Recipe
from ssmprune_cli.statistics import paired_interval, wilson_interval
from ssmprune_cli.workflows.compress import Source
from ssmprune_cli.workflows.evaluate import spread
from ssmprune_cli.workflows.flops import count_flops
from ssmprune_cli.workflows.profile import interleaved_speeds, resolve_device
from ssmprune_cli.workflows.search.measure import load_images, run
from ssmprune_cli.workflows.uniform import Budget, Uniform

Progress = Callable[[str], Callable[[int, int], None]]


@dataclass(frozen=True)
class Row:
    """One model on the images.

    budget               what was asked for, such as "flops 0.7"; "" for dense models and recipes
    multiply_adds        of one image, all directions; `share` is that of the dense model
    divergence           mean KL(dense || this) in nats with its standard error; None for other dense models
    top1                 with its 95 % interval (Wilson), and the difference from dense (Tango's paired interval); None
                         for images without labels
    images_per_second    median of timed turns of the dense model and this one; `speedup` is the ratio of the medians
    """

    name: str
    budget: str
    points: tuple[int, ...]
    tokens: tuple[int, ...]
    multiply_adds: int
    share: float
    images_per_second: float
    speedup: float
    divergence: float | None
    divergence_se: float | None
    top1: float | None
    top1_interval: tuple[float, float] | None
    difference: float | None
    difference_interval: tuple[float, float] | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Images:
    """`pixels` (N, 3, H, W) prepared for one model, and `labels` (N,) or None."""

    pixels: Tensor
    labels: Tensor | None


def evaluation_images(dataset: ImageDataset, model: Backbone, limit: int | None) -> Images:
    """The images of `dataset`, or `limit` of them (always the same, see `spread`)."""
    if limit is not None and limit < len(dataset):
        dataset = Subset(dataset, spread(len(dataset), limit))
    loaded = list(batches(dataset, model.preprocessing, 64))
    labels = [batch.labels for batch in loaded if batch.labels is not None]
    pixels = torch.cat([batch.images for batch in loaded]).to(next(model.parameters()).device)
    return Images(pixels, torch.cat(labels) if len(labels) == len(loaded) else None)


class Comparison:
    """One dense model, and pruned variants of it on the same images."""

    def __init__(
        self, source: Source, dataset: ImageDataset, *, limit: int | None, batch_size: int, device: str, rounds: int
    ) -> None:
        if len(dataset) < 2:
            raise DataError("a comparison needs at least two images")
        self.model = source.load().to(resolve_device(device)).eval()
        self.reference = source.load().to(resolve_device(device)).eval()
        restore(self.model)
        restore(self.reference)
        self.batch_size, self.rounds = batch_size, rounds
        self.images = evaluation_images(dataset, self.model, limit)
        self.name = source.path.name
        self._logits = self._finite(self.model, self.name)
        self._cost = count_flops(self.model).all_directions

    def dense(self) -> Row:
        return self._row(self.name, "", self._logits, self._cost, self._time(self.model), None)

    def other_dense(self, source: Source, dataset: ImageDataset, limit: int | None) -> Row:
        """Another dense model on the same images, prepared its own way."""
        model = source.load().to(self.images.pixels.device).eval()
        restore(model)
        images = evaluation_images(dataset, model, limit)
        logits = run(model, images.pixels, self.batch_size)
        cost = count_flops(model).all_directions
        row = self._row(source.path.name, "", logits, cost, self._time(model), None)
        return replace(row, divergence=None, divergence_se=None)

    def pruned(self, name: str, budget: str, settings: PruneSettings, calibration: Tensor | None) -> tuple[Row, Tensor]:
        """A variant's row, and the divergence of every image."""
        schedule = settings.schedule
        compress(
            self.model,
            tokens=schedule.tokens,
            points=schedule.points,
            importance=settings.importance,
            reduction=settings.reduction,
            alignment=settings.alignment,
            calibration=None if calibration is None else calibration.split(self.batch_size),
            seed=settings.seed,
        )
        logits = self._finite(self.model, f"{name} {budget}".strip())
        cost = count_flops(self.model).all_directions
        row = self._row(name, budget, logits, cost, self._time(self.model), settings)
        restore(self.model)
        return row, divergence(self._logits, logits)

    def _finite(self, model: Backbone, name: str) -> Tensor:
        logits = run(model, self.images.pixels, self.batch_size)
        if not bool(logits.isfinite().all()):
            raise DataError(f"{name} gives logits that are not finite", hint="`ssmprune inspect` looks at the weights.")
        return logits

    def _time(self, model: Backbone) -> tuple[float, float]:
        """Images per second, and how many times as fast as the dense model."""
        size = (self.batch_size, 3, *model.image_size)
        if model.image_size == self.reference.image_size:
            batch = torch.zeros(size, device=self.images.pixels.device)
            dense, own = interleaved_speeds([self.reference, model], batch, self.rounds)
            return own.images_per_second, dense.median_ms / own.median_ms
        (own,) = interleaved_speeds([model], torch.zeros(size, device=self.images.pixels.device), self.rounds)
        dense_batch = torch.zeros(self.batch_size, 3, *self.reference.image_size, device=self.images.pixels.device)
        (dense,) = interleaved_speeds([self.reference], dense_batch, self.rounds)
        return own.images_per_second, dense.median_ms / own.median_ms

    def _row(
        self,
        name: str,
        budget: str,
        logits: Tensor,
        cost: int,
        speed: tuple[float, float],
        settings: PruneSettings | None,
    ) -> Row:
        labels = self.images.labels
        top1 = interval = difference = difference_interval = None
        if labels is not None:
            right, before = (each.argmax(dim=1) == labels for each in (logits, self._logits))
            top1 = float(right.double().mean())
            interval = wilson_interval(int(right.sum()), len(right))
            gained, lost = int((right & ~before).sum()), int((before & ~right).sum())
            difference = (gained - lost) / len(right)
            difference_interval = paired_interval(gained, lost, len(right))
        nats = divergence(self._logits, logits) if logits.shape == self._logits.shape else None
        return Row(
            name=name,
            budget=budget,
            points=settings.schedule.points if settings else (),
            tokens=settings.schedule.tokens if settings else (),
            multiply_adds=cost,
            share=cost / self._cost,
            images_per_second=speed[0],
            speedup=speed[1],
            divergence=None if nats is None else float(nats.mean()),
            divergence_se=None if nats is None else float(nats.std()) / math.sqrt(len(nats)),
            top1=top1,
            top1_interval=interval,
            difference=difference,
            difference_interval=difference_interval,
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
    batch_size: int = 64,
    rounds: int = 5,
    device: str = "cpu",
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[list[Row], list[str]]:
    """Rows (the dense model first), and what a reader must know.

    methods  each at every budget; recipes as they are; others: further dense checkpoints
    calib    unlabelled images for methods that are calibrated

    Raises UsageError for a method that needs calibration without any, DataError for logits that are not finite.
    """
    for method in methods:
        choose_alignment(method.alignment, method.reduction, calibrated=calib is not None)
    comparison = Comparison(source, dataset, limit=limit, batch_size=batch_size, device=device, rounds=rounds)
    calibration = None
    if calib is not None:
        calibration = load_images(comparison.model, calibration_images(calib, calib_images, seed))
    done = progress("Comparing") if progress else None
    total = 1 + len(methods) * len(budgets) + len(recipes) + len(others)
    rows, notes = [comparison.dense()], []

    def advance() -> None:
        if done:
            done(len(rows), total)

    for other in others:
        rows.append(comparison.other_dense(other, dataset, limit))
        advance()
    for recipe in recipes:
        rows.append(
            comparison.pruned(recipe.name, "", recipe_settings(comparison.model, recipe, calib), calibration)[0]
        )
        advance()
    seen = comparison.images.pixels[:2] if calibration is None else calibration
    uniform = Uniform(comparison.model, seen, batch_size=batch_size, seed=seed) if budgets else None
    for budget in budgets:
        for method in methods:
            assert uniform is not None
            settings, title = uniform.settings(method, budget), f"{budget.kind} {budget.value:g}"
            if settings is None:
                notes.append(f"{method} cannot save enough for {title}.")
                continue
            rows.append(comparison.pruned(str(method), title, settings, calibration)[0])
            advance()
    return rows, notes


def recipe_settings(model: Backbone, recipe: Recipe, calib: Path | None) -> PruneSettings:
    """What `recipe` means for `model`."""
    pruning = recipe.pruning
    return PruneSettings(
        PruneSchedule.resolve(model.stages, points=pruning.points, keep=pruning.keep, tokens=pruning.tokens),
        pruning.importance,
        pruning.reduction,
        choose_alignment(pruning.alignment, pruning.reduction, calibrated=calib is not None),
        recipe.seed,
    )


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
        if recipe.pruning.reduction not in REDUCTIONS.names() or recipe.pruning.importance not in IMPORTANCES.names():
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
