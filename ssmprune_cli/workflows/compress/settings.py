"""What a recipe means for a model: its size, and the settings of its pruner."""

from __future__ import annotations

import math

from ssmprune_cli.errors import UsageError, listing
from ssmprune_cli.models import Backbone, Size, sides, smaller
from ssmprune_cli.pruning import DEFAULT_REDUCTION, REDUCTIONS, PruneSchedule, PruneSettings, choose_alignment
from ssmprune_cli.recipe import Pruning, Recipe


def made_smaller(model: Backbone, recipe: Recipe) -> Backbone:
    """The dense `model`, or the smaller one that `recipe` says. UsageError if there is none of that size."""
    side = recipe.pruning.image_size
    if side is not None and side >= model.image_size[0]:
        raise UsageError(
            f"the model takes images of {model.image_size[0]} pixels, so {side} is no smaller side",
            hint=f"Possible sides: {listing(sides(model), limit=20) or 'none'}.",
        )
    return smaller(model, recipe_size(recipe))


def recipe_size(recipe: Recipe) -> Size:
    """Of the model that tokens are dropped from."""
    return Size(recipe.pruning.image_size, recipe.pruning.cut_blocks or 0)


def recipe_settings(
    model: Backbone, recipe: Recipe, *, calibrated: bool, reduction: str = DEFAULT_REDUCTION
) -> PruneSettings | None:
    """What `recipe` means for `model`, with calibration images or without; `reduction` where it says "auto". None if no
    tokens are dropped."""
    pruning = recipe.pruning
    if not pruning.drops_tokens:
        return None
    reduction = reduction if pruning.reduction == "auto" else pruning.reduction
    return PruneSettings(
        PruneSchedule.resolve(
            model.stages,
            points=pruning.points,
            keep=pruning.keep,
            tokens=pruning.tokens,
            rectangular=REDUCTIONS.get(reduction).rectangular,
        ),
        pruning.importance,
        reduction,
        choose_alignment(pruning.alignment, reduction, calibrated=calibrated),
        recipe.seed,
        returning=pruning.returning,
    )


def rounded(settings: PruneSettings | None, pruning: Pruning, model: Backbone) -> list[str]:
    """A warning if fewer tokens stay than were asked for, since only whole grids can."""
    if settings is None or not settings.schedule.grids:
        return []
    schedule = settings.schedule
    patches = schedule.patches_per_block(model.stages)
    before = [patches[point - 1] for point in schedule.points]
    given = [pruning.keep] * len(before) if isinstance(pruning.keep, int | float) else list(pruning.keep or ())
    asked = pruning.tokens or [math.floor(ratio * count) for ratio, count in zip(given, before, strict=True)]
    if all(count >= least for count, least in zip(schedule.tokens, asked, strict=True)):
        return []
    grids = ", ".join(f"{rows} x {columns}" for rows, columns in schedule.grids)
    return [f"Only whole grids can stay, so there are fewer tokens than asked for: {grids} after the prune points."]
