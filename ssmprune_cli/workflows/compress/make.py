"""The model that a recipe makes: smaller, pruned, repaired. What is judged and delivered is made here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ssmprune_cli.data import ImageDataset, Subset
from ssmprune_cli.inference import prepare
from ssmprune_cli.models import Backbone
from ssmprune_cli.pruning import (
    ALIGNMENT_IMAGES,
    DEFAULT_REDUCTION,
    REDUCTIONS,
    Calibration,
    PruneSettings,
    Repaired,
    prune,
    repair,
)
from ssmprune_cli.recipe import Recipe
from ssmprune_cli.report import DistillationFacts, ReductionTrial
from ssmprune_cli.tasks import TASKS
from ssmprune_cli.workflows.compress.distillation import distil
from ssmprune_cli.workflows.compress.reductions import CANDIDATES, MOST_IMAGES, MOST_SECONDS, Choice, compare_reductions
from ssmprune_cli.workflows.compress.request import CompressRequest
from ssmprune_cli.workflows.compress.settings import rounded
from ssmprune_cli.workflows.eight_bits import EightBits, to_eight_bits
from ssmprune_cli.workflows.evaluate import spread
from ssmprune_cli.workflows.trials import Prepared, load_images, run, sampled

_NOT_REFITTED = (
    "The head was trained for the output of blocks that are left out now: it should be refitted, and was not. Give "
    "more `--calib` images, and no `--repair none`."
)

Progress = Callable[[str], Callable[[int, int], None]]  # what is being done -> (done, total) callback


@dataclass(frozen=True)
class Made:
    """A model, and what there is to say of how it was made.

    settings    of its pruner; None if no tokens are dropped
    images      that it was calibrated on, or None without any
    seen        by calibration
    distilled   what a training on the images did, if one was asked for
    reductions  those that were compared, if one was to be chosen
    eight_bits  what became of weights that were to be in eight bits
    """

    model: Backbone
    settings: PruneSettings | None
    images: ImageDataset | None
    seen: Calibration | None
    repaired: Repaired | None
    reductions: tuple[ReductionTrial, ...]
    warnings: tuple[str, ...]
    eight_bits: EightBits | None = None
    distilled: DistillationFacts | None = None

    @property
    def uses_images(self) -> bool:
        """Whether the images had a part in it."""
        return self.settings is not None or self.repaired is not None or self.eight_bits is not None

    @property
    def drops(self) -> bool:
        """Whether any token is dropped."""
        return self.settings is not None and self.settings.schedule.shortens(self.model.stages)


def make(request: CompressRequest, recipe: Recipe, reference: Backbone, progress: Progress | None) -> Made:
    """Make the model of `recipe`, which is that of `request` or one that a search for it found.

    reference  the dense model, on the device of choice
    """
    model = request.made_smaller(request.source.load(), recipe).to(next(reference.parameters()).device)
    settings = request.settings(model, recipe)
    warnings = []
    cut, kind = recipe.pruning.cut_blocks is not None, recipe.pruning.repair
    if request.calib is None:
        warnings += [_NOT_REFITTED] if cut else []
        if settings is not None:
            text = f"Nothing was calibrated: no calibration images were given. Alignment is {settings.alignment!r}."
            warnings.append(text)
            warnings += rounded(settings, recipe.pruning, model)
            prune(model, settings, None)
        if recipe.pruning.distill_steps:
            warnings.append("The recipe's distillation was left out: no calibration images were given.")
        rounded_weights = _to_eight_bits(model, recipe, None)
        warnings += () if rounded_weights is None else rounded_weights.warnings
        return Made(model, settings, None, None, None, (), tuple(warnings), rounded_weights)
    task = TASKS.get(model.task)
    images = task.calibration(model, request.calib, recipe.calibration.images, recipe.calibration.seed)
    if len(images) < recipe.calibration.images and request.counts_images:
        warnings.append(f"Only {len(images)} of {recipe.calibration.images} calibration {task.cases} were found.")
    warnings += images.notes
    batch_size = task.at_once(recipe.calibration.batch_size)
    steps = recipe.pruning.distill_steps
    dense = None  # the logits of the dense model, if it is larger, its weights will not be there, or it is to teach
    if model.config != reference.config or recipe.pruning.weights == "int8" or steps:
        dense = run(prepare(reference), Prepared(reference, images, batch_size))

    def repaired() -> Repaired | None:
        if kind == "none":
            return None
        parts = Prepared(model, images, batch_size, progress and progress("Repairing"))
        result = repair(model, parts, kind=kind, runner=prepare(model).with_pruner, dense=dense)
        warnings.extend(result.warnings)
        if kind != "auto" and result.kind == "none":
            warnings.append(f"The repair {kind!r} was refused: {result.refused[kind]}.")
        return result

    # What all but a repair is chosen and calibrated on.
    every = kind == "none" or len(images) <= ALIGNMENT_IMAGES
    rows = list(range(len(images))) if every else spread(len(images), ALIGNMENT_IMAGES)
    few = images if every else Subset(images, rows)
    few_dense = None if dense is None else dense[rows]

    def eight_bits() -> EightBits | None:
        done = progress and progress("Measuring eight bits")
        found = _to_eight_bits(model, recipe, Prepared(model, few, batch_size, done))
        warnings.extend(() if found is None else found.warnings)
        return found

    def finished(seen: Calibration | None, tried: tuple[ReductionTrial, ...]) -> Made:
        """Repaired, trained, in eight bits, as far as that is asked for."""
        weights = result = learnt = None
        if not steps:
            weights = eight_bits()  # the repair then is of what both have done
        if settings is not None or dense is not None:
            result = repaired()
        if steps and dense is not None:
            learnt = distil(
                model,
                images,
                reference,
                steps,
                dense=dense,
                kind="none" if result is None else result.kind,
                seed=recipe.seed,
                done=progress and progress("Distilling"),
            )
            warnings.extend(_not_kept(learnt))
            weights = eight_bits()  # bytes do not learn
        trained = learnt is not None and learnt.kept
        if cut and not trained and (result is None or result.kind == "none"):
            warnings.append(_NOT_REFITTED)
        warnings.extend(images.notes)  # what was noticed when they were read
        return Made(model, settings, images, seen, result, tried, tuple(warnings), weights, learnt)

    if settings is None:
        return finished(None, ())
    tried: tuple[ReductionTrial, ...] = ()
    if recipe.pruning.reduction == "auto" and settings.schedule.shortens(model.stages):
        choices = _compared(request, model, recipe, settings, few, few_dense, progress)
        tried = _trials(choices)
        if choices and choices[0].images < min(len(few), MOST_IMAGES):
            warnings.append(
                f"The reductions were compared on {choices[0].images} of {len(few)} calibration images, because one "
                "image takes long. `--calib-images` says how many to take, `--reduction` spares the comparison."
            )
        best = next((each.reduction for each in tried if each.chosen), None)
        if best is None:
            warnings.append(
                "The reductions could not be compared at equal time: the clock of this machine is too uneven. "
                f"{DEFAULT_REDUCTION!r} was taken."
            )
        settings = request.settings(model, recipe, reduction=best or DEFAULT_REDUCTION)
        assert settings is not None
    warnings += rounded(settings, recipe.pruning, model)
    seen = prune(
        model,
        settings,
        Prepared(model, few, batch_size, progress and progress("Calibrating")),
        dense=few_dense,
        runner=sampled(prepare(model)),
        distance=task.divergence,
    )
    return finished(seen, tried)


def _not_kept(learnt: DistillationFacts) -> list[str]:
    """A warning if the training did not pay."""
    if learnt.kept:
        return []
    why = (
        "an update was not finite"
        if learnt.divergence_after is None
        else "it is not clearly better on images held back"
    )
    hint = "More `--calib-images`, and more steps, teach more."
    return [f"The distillation of {learnt.steps} steps was not kept: {why}. {hint}"]


def _to_eight_bits(model: Backbone, recipe: Recipe, batches: Iterable[Tensor] | None) -> EightBits | None:
    """`to_eight_bits` as `recipe` says; None if all weights stay in float."""
    if recipe.pruning.weights != "int8":
        return None
    return to_eight_bits(model, batches, recipe.pruning.int8)


def _compared(
    request: CompressRequest,
    model: Backbone,
    recipe: Recipe,
    settings: PruneSettings,
    images: ImageDataset,
    dense: Tensor | None,
    progress: Progress | None,
) -> Sequence[Choice]:
    return compare_reductions(
        model,
        settings.schedule,
        load_images(model, images),
        # A grid is merged by no score: it is no candidate where one is asked for.
        candidates=[each for each in CANDIDATES if not (request.names_score and REDUCTIONS.get(each).rectangular)],
        importance=settings.importance,
        alignment=recipe.pruning.alignment,
        batch_size=TASKS.get(model.task).at_once(8, request.batch_size),
        device=request.device,
        dense=dense,
        seed=settings.seed,
        seconds=math.inf if request.counts_images else MOST_SECONDS,
        progress=progress and progress("Comparing reductions"),
    )


def _trials(choices: Sequence[Choice]) -> tuple[ReductionTrial, ...]:
    return tuple(
        ReductionTrial(
            reduction=each.method.reduction,
            alignment=each.method.alignment,
            tokens=each.schedule.tokens,
            divergence=each.divergence if math.isfinite(each.divergence) else None,
            chosen=each is choices[0],
        )
        for each in choices
    )
