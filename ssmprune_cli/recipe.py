"""A recipe says how to compress a model. It is read without torch, so names of scores and the like are text here.

The text layer (safe YAML that knows its lines) is `yaml_text.py`, the wording of faults `validation.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ssmprune_cli.errors import RecipeError, UsageError
from ssmprune_cli.validation import Location, explain, suggestion
from ssmprune_cli.yaml_text import Document, YamlFault, dump_yaml, parse_yaml

MAX_BYTES = 1 << 20


def _list_to_tuple(value: object) -> object:
    if value in ([], ()):
        raise ValueError("must not be empty")
    return tuple(value) if isinstance(value, list) else value


PositiveInt = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
Counts = Annotated[tuple[PositiveInt, ...], BeforeValidator(_list_to_tuple)]
Name = Annotated[str, Field(min_length=1)]


KnownNames = Mapping[str, Sequence[str]]  # names that exist, by kind: family, importance, reduction, alignment


def _check_name(name: str | None, info: ValidationInfo) -> str | None:
    """Refuse a name that is not among the known ones, where the caller knows any."""
    known = (info.context or {}).get(info.field_name)
    if name is None or known is None or name in known:
        return name
    raise ValueError(f"unknown {info.field_name} {name!r}; {suggestion(name, known)}")


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class ModelChoice(_Section):
    """Which model the recipe was made for; it guides detection when the checkpoint leaves it open."""

    family: Name
    variant: Name | None = None

    _known = field_validator("family")(_check_name)


class Pruning(_Section):
    """Where tokens are dropped, how many stay, and how.

    points     prune after this many blocks, rising; None is a quarter, half and three quarters of the depth
    keep       ratio of patch tokens kept *at each point*, 0 < keep <= 1: one number or one a point
    tokens     instead of `keep`: patch tokens that stay after each point
    alignment  "auto" is the best that is possible: `calibrated` with calibration images, else `null`. YAML's bare
               null means the source of that name
    """

    points: Counts | None = None
    keep: float | tuple[float, ...] | None = None
    tokens: Counts | None = None
    importance: Name = "clip"
    reduction: Name = "context"
    alignment: Annotated[Name, BeforeValidator(lambda value: "null" if value is None else value)] = "auto"

    _known = field_validator("importance", "reduction", "alignment")(_check_name)

    @field_validator("points")
    @classmethod
    def _rising(cls, points: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if points is not None and list(points) != sorted(set(points)):
            raise ValueError("must be block numbers in rising order, each once")
        return points

    @field_validator("keep", mode="before")
    @classmethod
    def _ratios(cls, keep: object, info: ValidationInfo) -> float | tuple[float, ...] | None:
        if keep is None:
            return None
        if not isinstance(keep, list | tuple):
            return _ratio(keep)
        if not keep:
            raise ValueError("must be a number or a list of numbers, not an empty list")
        ratios = tuple(_ratio(item) for item in keep)
        _match_points(ratios, info)
        return ratios

    @field_validator("tokens")
    @classmethod
    def _falling(cls, tokens: tuple[int, ...] | None, info: ValidationInfo) -> tuple[int, ...] | None:
        if tokens is None:
            return None
        if info.data.get("keep") is not None:
            raise ValueError("give either `keep` or `tokens`, and set the other to null")
        if list(tokens) != sorted(tokens, reverse=True):
            raise ValueError("must not rise: a dropped token does not come back")
        _match_points(tokens, info)
        return tokens

    @model_validator(mode="after")
    def _says_how_many(self) -> Pruning:
        if self.keep is None and self.tokens is None:
            raise ValueError("give `keep` (a ratio) or `tokens` (counts)")
        return self


def _ratio(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"must be a number or a list of numbers, not {value!r}")
    if not 0 < value <= 1:
        raise ValueError(f"must be above 0 and at most 1 (the ratio kept at each point), not {value:g}")
    return float(value)


def _match_points(values: Sequence[object], info: ValidationInfo) -> None:
    points = info.data.get("points")
    if points is not None and len(values) != len(points):
        raise ValueError(f"has length {len(values)}, but `points` has length {len(points)}")


class CalibrationPlan(_Section):
    """How many images are taken, which ones (by `seed`), and how many run at once."""

    images: PositiveInt = 64
    seed: Seed = 0
    batch_size: PositiveInt = 16


class Recipe(_Section):
    """All settings of a compression. `provenance` is filled in the recipe that is written beside a compressed model."""

    format: Literal[1] = 1
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "custom"
    description: str = ""
    source: str = ""
    model: ModelChoice | None = None
    pruning: Pruning
    calibration: CalibrationPlan = CalibrationPlan()
    seed: Seed = 0
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

    def override(self, assignments: Iterable[str]) -> Recipe:
        """This recipe with `key=value` settings such as "pruning.keep=0.7"; values are YAML.

        Raises UsageError that lists every fault.
        """
        values = self.to_dict()
        faults = [fault for text in assignments if (fault := _assign(values, text))]
        if not faults:
            try:
                return Recipe.model_validate(values)
            except ValidationError as error:
                faults = [f"{'.'.join(map(str, loc)) or 'recipe'}: {text}" for loc, text in explain(error, SECTIONS)]
        raise UsageError(
            "\n".join(faults), where="--set", hint="Keys look like pruning.keep=0.7 or calibration.seed=1."
        )


SECTIONS: dict[Location, type[BaseModel]] = {
    (): Recipe,
    ("model",): ModelChoice,
    ("pruning",): Pruning,
    ("calibration",): CalibrationPlan,
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
        with file.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"cannot be read: {error.strerror or error}", where=str(file)) from error
    if len(content) > MAX_BYTES:
        raise RecipeError(f"is larger than {MAX_BYTES:,} bytes, so it is not a recipe", where=str(file))
    try:
        return content.decode("utf-8-sig")
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
    package = Path(__file__).parent
    folder = next(folder for folder in (package / "recipes", package.parent / "recipes") if folder.is_dir())
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


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
