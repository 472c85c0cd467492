"""`ssmprune_cli.save`: a model as an artefact folder, with what can be told of it without its history."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from ssmprune_cli import __version__, checkpoint
from ssmprune_cli.errors import CheckpointError, UsageError, listing
from ssmprune_cli.inference import Session
from ssmprune_cli.models import FAMILIES, WHOLE, Backbone, blocks_left_out, dense_config, size_of
from ssmprune_cli.pruning import TokenPruner
from ssmprune_cli.recipe import Recipe
from ssmprune_cli.workflows.reporting import CARD, card_head


def save(model: Backbone, folder: Path | str, *, dense: Backbone | None = None, overwrite: bool = False) -> None:
    """Write `model`, with its pruner, to `folder`: `ssmprune_cli.load(folder)` and every command take it.

    The folder has the model.safetensors and config.json that `ssmprune compress` writes, byte for byte the same for the
    same model; a README.md, the model card; and for a compressed model recipe.yaml, the settings as far as a recipe
    can say them. There is no report: nothing was measured.

    dense      what a `model` that was resized or cut short was made of, so that it can be compressed again from there
    overwrite  replace an earlier output of ours

    All of it is written or nothing. Raises UsageError for what is no model of ours, or has weights beside its family's,
    and CheckpointError for weights that are not finite and for a folder that cannot be written.
    """
    _check(model, dense)
    recipe = _recipe(model)
    files = {CARD: _card(model, recipe)}
    if isinstance(recipe, Recipe):
        files["recipe.yaml"] = recipe.to_yaml()
    checkpoint.save(Path(folder), model, files, dense=dense, overwrite=overwrite)


def _check(model: object, dense: Backbone | None) -> None:
    if isinstance(model, Session):
        raise UsageError("a session is a snapshot that cannot be saved", hint="Save the model that it was prepared of.")
    if not isinstance(model, Backbone):
        raise UsageError(
            f"a {type(model).__name__} is no model of ssmprune, so its folder could not be loaded",
            hint="Save what `ssmprune_cli.load` returned; for another module use torch.save.",
        )
    if model.pruner is not None and not isinstance(model.pruner, TokenPruner):
        raise UsageError(
            f"its pruner is a {type(model.pruner).__name__}, which a folder cannot hold",
            hint="Save it with the pruner of `ssmprune_cli.compress`, or without one: `ssmprune_cli.restore(model)`.",
        )
    state = model.state_dict()
    if any(value.is_meta for value in state.values()):
        raise UsageError("its weights are on the meta device, where they have no values")
    settings = model.pruner.settings.to_dict() if isinstance(model.pruner, TokenPruner) else None
    try:
        family = FAMILIES.get(model.family)
        checkpoint.build_empty(family, model.config, settings, state, Path("model"), model.eight_bit_kinds)
    except CheckpointError as error:
        raise UsageError(
            f"does not have the weights of its configuration: {error.what}",
            where=type(model).__name__,
            hint="Merge or remove what was put into the model, such as adapters and parametrizations, and save again.",
        ) from error
    if broken := checkpoint.non_finite(state):
        raise CheckpointError(f"{len(broken)} weights have values that are not finite: {listing(broken)}")
    if dense is not None and model.eight_bit_kinds:
        raise UsageError("is of no use to a model in eight bits", where="dense", hint="Leave `dense` out.")
    if dense is not None and (dense.config == model.config or dense.config != dense_config(model.config)):
        raise UsageError("is not the model that the other one was made of", where="dense", hint="Leave `dense` out.")


def _recipe(model: Backbone) -> Recipe | str | None:
    """The settings as a recipe, or why a recipe cannot say them. None if nothing was compressed."""
    pruner, size, seed = model.pruner, size_of(model), 0
    values: dict[str, object] = {"image_size": size.side, "cut_blocks": size.cut or None}
    if model.eight_bit_kinds:
        values |= {"weights": "int8", "int8": list(model.eight_bit_kinds)}
    if isinstance(pruner, TokenPruner):
        settings, seed = pruner.settings, pruner.settings.seed
        if settings.repair == "side":
            return "it cannot say that the head was merged into the weights after a repair"
        values |= {
            "points": list(settings.schedule.points),
            "tokens": list(settings.schedule.tokens),
            "importance": settings.importance,
            "reduction": settings.reduction,
            "alignment": settings.alignment,
            "repair": settings.repair,
            "returning": settings.returning,
        }
    elif size == WHOLE and not model.eight_bit_kinds:
        return None
    try:
        return Recipe.model_validate(
            {
                "description": "Settings of a model that Python saved; its calibration images are not known.",
                "model": {"family": model.family},
                "pruning": values,
                "seed": seed,
                "provenance": {"ssmprune": __version__},
            }
        )
    except ValidationError as error:
        return "; ".join(fault["msg"] for fault in error.errors())


def _card(model: Backbone, recipe: Recipe | str | None) -> str:
    pruner = model.pruner
    height, width = model.image_size
    parameters = model.parameter_count
    text = f"Family {model.family}, {height}x{width} pixels, {parameters:,} parameters."
    if model.eight_bit_kinds:
        text += f" In eight bits: the weights of {', '.join(model.eight_bit_kinds)}."
    if model.config.resized_from is not None:
        text += f" The dense model takes images of {model.config.resized_from[0]} pixels."
    if left_out := blocks_left_out(model):
        text += f" Of the dense model's blocks, these are left out: {', '.join(str(block + 1) for block in left_out)}."
    if isinstance(pruner, TokenPruner):
        settings = pruner.settings
        points, tokens = (", ".join(map(str, each)) for each in (settings.schedule.points, settings.schedule.tokens))
        text += (
            f" After {points} blocks, {tokens} patch tokens stay. Importance {settings.importance}, reduction "
            f"{settings.reduction}, alignment {settings.alignment}, repair {settings.repair}."
        )
    notes = ["Saved from Python: nothing was measured."]
    if recipe is not None:
        notes.append("What it was compressed from, and on which images, is not known.")
    if isinstance(recipe, str):
        notes.append(f"There is no recipe.yaml: {recipe}.")
    title = f"{model.family}, {'all tokens kept' if pruner is None else 'tokens dropped'}"
    return "\n".join(
        [
            f"{card_head(model.family, model.task, pruned=pruner is not None)}# {title}",
            "",
            text,
            "",
            *(f"> {note}  " for note in notes),
            "",
            f"Load it with `ssmprune_cli.load(folder)` (ssmprune {__version__}).",
            "",
        ]
    )
