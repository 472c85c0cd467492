"""`ssmprune recipes list|show|validate`."""

from __future__ import annotations

from typing import Annotated

import typer

from ssmprune_cli.cli import output
from ssmprune_cli.cli.help import Command
from ssmprune_cli.cli.options import AsJson
from ssmprune_cli.cli.quiet import quietly
from ssmprune_cli.errors import RecipeError
from ssmprune_cli.recipe import Recipe, find_recipe, load_recipe, parse_recipe, read_recipe, shipped_recipes

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="List, show and check compression recipes.")

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file or the name of a shipped one.")]


@app.command("list", cls=Command)
@quietly
def list_recipes(as_json: AsJson = False) -> None:
    """List the recipes that come with ssmprune."""
    from rich.table import Table

    found = [load_recipe(file) for file in shipped_recipes().values()]
    table = Table()
    table.add_column("name", no_wrap=True)
    for column in ("description", "prune after blocks", "kept at each point"):
        table.add_column(column)
    for recipe in found:
        table.add_row(recipe.name, recipe.description, *_schedule(recipe))
    output.emit(table, {"recipes": [recipe.to_dict() for recipe in found]}, as_json=as_json)


@app.command("show", cls=Command)
@quietly
def show(recipe: RecipeArgument, as_json: AsJson = False) -> None:
    """Print a recipe with its comments, to read or to start one's own from."""
    file = find_recipe(recipe)
    text = read_recipe(file)
    parsed = parse_recipe(text, name=str(file))
    if as_json:
        output.json_text(parsed.to_dict())
    else:
        output.text(text)


@app.command("validate", cls=Command)
@quietly
def validate(
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE...", help="Recipe files or names of shipped ones.")],
    as_json: AsJson = False,
) -> None:
    """Check recipes: every fault is listed with its line and column. Exits with 1 if there is one."""
    from ssmprune_cli.models import FAMILIES
    from ssmprune_cli.pruning import ALIGNMENTS, IMPORTANCES, REDUCTIONS

    known = {
        "family": FAMILIES.names(),
        "importance": IMPORTANCES.names(),
        "reduction": ("auto", *REDUCTIONS.names()),
        "alignment": ("auto", *ALIGNMENTS.names()),
    }
    faults: dict[str, str] = {}
    for recipe in recipes:
        try:
            load_recipe(recipe, known=known)
        except RecipeError as error:
            faults[recipe] = str(error)
    verdicts = [{"recipe": each, "valid": each not in faults, "faults": faults.get(each)} for each in recipes]
    if as_json:
        output.json_text({"recipes": verdicts})
    else:
        output.text("".join(f"{each}: valid\n" for each in recipes if each not in faults))
    if faults:
        raise RecipeError("\n".join(faults.values()))


def _schedule(recipe: Recipe) -> tuple[str, str]:
    pruning = recipe.pruning
    if not pruning.drops_tokens:
        side = "" if pruning.image_size is None else f", of images of {pruning.image_size} pixels"
        return "none", f"all{side}" if pruning.cut_blocks is None else f"all{side}, {pruning.cut_blocks} blocks cut"
    points = ", ".join(map(str, pruning.points)) if pruning.points else "1/4, 1/2, 3/4 of the depth"
    if pruning.tokens is not None:
        return points, f"{', '.join(map(str, pruning.tokens))} tokens"
    ratios = pruning.keep if isinstance(pruning.keep, tuple) else (pruning.keep,)
    return points, ", ".join(map(str, ratios))
