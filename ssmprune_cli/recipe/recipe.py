"""A recipe says how to compress a model. It is read without torch, so names of scores and the like are text here.

The sections are in `recipe_sections.py`, the text layer (safe YAML that knows its lines) is `yaml_text.py`, the wording
of faults `validation.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, JsonValue, ValidationError

from ssmprune_cli.errors import RecipeError, UsageError
from ssmprune_cli.files import read_bytes
from ssmprune_cli.recipe.sections import (
    CalibrationPlan,
    KnownNames,
    ModelChoice,
    Pruning,
    Published,
    Section,
    Seed,
    Training,
)
from ssmprune_cli.recipe.validation import Location, explain, suggestion
from ssmprune_cli.recipe.yaml_text import Document, YamlFault, dump_yaml, parse_yaml

MAX_BYTES = 1 << 17


class Recipe(Section):
    """All settings of a compression. `provenance` is filled in the recipe that is written beside a compressed model."""

    format: Literal[1] = 1
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "custom"
    description: str = ""
    source: str = ""
    model: ModelChoice | None = None
    pruning: Pruning
    calibration: CalibrationPlan = CalibrationPlan()
    training: Training | None = None
    seed: Seed = 0
    published: Published | None = None
    provenance: dict[str, JsonValue] = Field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; what is unset is left out."""
        values = self.model_dump(mode="json", exclude_none=True)
        values["provenance"] = dict(self.provenance)  # here a null means something
        return {key: value for key, value in values.items() if value not in ("", {})}

    def to_yaml(self) -> str:
        """YAML text that `parse_recipe` turns into an equal recipe; the same recipe gives the same bytes."""
        return dump_yaml(self.to_dict())

    def resolved(self, pruning: Mapping[str, Any], provenance: Mapping[str, Any]) -> Recipe:
        """This recipe with the pruning settings that were used, points and alignment included, and their provenance.

        `pruning` may name token counts beside the ratios they follow from; the ratios are kept then.
        """
        settings = dict(pruning)
        if settings.get("keep") is not None:
            settings["tokens"] = None
        return Recipe.model_validate({**self.to_dict(), "pruning": settings, "provenance": dict(provenance)})

    def override(self, assignments: Iterable[str], options: Mapping[str, str] | None = None) -> Recipe:
        """This recipe with `key=value` settings such as "pruning.keep=0.7"; values are YAML.

        `options` are the keys that come from an option of their own, which messages then name; the rest is `--set`.
        Raises UsageError that lists every fault.
        """
        assignments = list(assignments)
        sources = {key: f"--set {key}" for text in assignments if (key := text.partition("=")[0].strip())}
        sources.update(options or {})
        values = self.to_dict()
        faults = [fault for text in assignments if (fault := _assign(values, text))]
        if faults:
            hint = "Keys look like pruning.keep=0.7 or calibration.seed=1."
            raise UsageError("\n".join(faults), where="--set", hint=hint)
        try:
            return Recipe.model_validate(values)
        except ValidationError as error:
            faults = [f"{_source(loc, sources)}: {text}" for loc, text in explain(error, SECTIONS)]
            raise UsageError("\n".join(faults)) from error


SECTIONS: dict[Location, type[BaseModel]] = {
    (): Recipe,
    ("model",): ModelChoice,
    ("pruning",): Pruning,
    ("calibration",): CalibrationPlan,
    ("training",): Training,
    ("published",): Published,
}


def load_recipe(path: Path | str, *, known: KnownNames | None = None) -> Recipe:
    """The recipe in a file, or the shipped recipe of this name; see `parse_recipe`."""
    file = find_recipe(path)
    return parse_recipe(read_recipe(file), name=str(file), known=known)


def find_recipe(path: Path | str) -> Path:
    """The file of a recipe: a str without suffix that is no file names a shipped recipe. Raises RecipeError."""
    file = Path(path)
    if isinstance(path, str) and not file.suffix and not file.exists():
        shipped = shipped_recipes()
        if path not in shipped:
            raise RecipeError(
                f"there is no file and no shipped recipe of this name; {suggestion(path, shipped)}",
                where=path,
                hint="See `ssmprune recipes list`.",
            )
        return shipped[path]
    return file


def read_recipe(file: Path) -> str:
    """The text of a recipe file. Raises RecipeError if it cannot be read or is no text."""
    try:
        return read_bytes(file, MAX_BYTES, RecipeError).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"is not UTF-8 text (byte {error.start})", where=str(file)) from error


def parse_recipe(text: str, *, name: str = "recipe", known: KnownNames | None = None) -> Recipe:
    """The recipe in `text`; `name` is how messages call it. With `known`, names of scores and the like are checked too.

    Raises RecipeError with every fault at once, each with its line and column.
    """
    document = Document({}, None)
    try:
        document = parse_yaml(text)
        faults = list(document.faults)
        recipe = Recipe.model_validate(document.value, context=known)
    except YamlFault as error:
        faults = [error]
    except ValidationError as error:
        faults += [
            YamlFault(*document.position(loc), f"{'.'.join(map(str, loc))}: {text}" if loc else text)
            for loc, text in explain(error, SECTIONS)
        ]
    if not faults:
        return recipe
    faults.sort(key=lambda fault: (fault.line, fault.column))
    lines = [f"{name}:{fault.line}:{fault.column}: {fault.text}" for fault in faults]
    count = "1 fault" if len(lines) == 1 else f"{len(lines)} faults"
    raise RecipeError("\n".join([f"not a valid recipe, {count} (file:line:column)", *lines]))


def shipped_recipes() -> dict[str, Path]:
    """Recipes that come with ssmprune, by name: of an installation (`ssmprune_cli/recipes`) or of a checkout."""
    package = Path(__file__).parent.parent
    folder = next(folder for folder in (package / "recipes", package.parent / "recipes") if folder.is_dir())
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def _source(loc: Location, sources: Mapping[str, str]) -> str:
    """Where the value at `loc` comes from: an option, or the recipe itself. A section's fault is that of its keys."""
    key = ".".join(map(str, loc))
    named = [
        source for own, source in sources.items() if f"{key}.".startswith(f"{own}.") or f"{own}.".startswith(f"{key}.")
    ]
    return " and ".join(dict.fromkeys(named)) or key or "recipe"


def _assign(values: dict[str, Any], assignment: str) -> str | None:
    """Apply one "a.b=value" to `values`. Returns the fault, if there is one."""
    key, equals, text = assignment.partition("=")
    path = tuple(key.strip().split("."))
    if not equals:
        return f"{assignment}: expected key=value"

    for depth, step in enumerate(path):
        section = SECTIONS.get(path[:depth])
        if section is None:
            return f"{key}: {'.'.join(path[:depth])} has no keys below it"
        if step not in section.model_fields:
            return f"{key}: unknown key; {suggestion(step, section.model_fields)}"
    try:
        document = parse_yaml(text)
    except YamlFault as fault:
        return f"{key}: {fault.text}"
    target = values
    for step in path[:-1]:
        if not isinstance(target.get(step), dict):
            target[step] = {}
        target = target[step]
    target[path[-1]] = document.value
    return None
