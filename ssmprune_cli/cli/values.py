"""What options take: a name out of a choice, a number in a range, a list of numbers.

Each is a parser for Typer, which names the option in front of what the parser says, and exits with 2.
"""

from __future__ import annotations

import ast
import difflib
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from pydantic import ConfigDict, TypeAdapter, ValidationError

from ssmprune_cli.errors import RecipeError, shown
from ssmprune_cli.plugins import family_plugins
from ssmprune_cli.recipe import Pruning, Section, Training, explain, find_recipe

_PACKAGE = Path(__file__).parents[1]

MAX_SEED = 2**63 - 1


def registered(module: str, registry: str) -> tuple[str, ...]:
    """Names that a registry holds, from the lines `REGISTRY.register("name", ...)` of its module.

    They are read as text: the module would import torch, and `--help` must not wait for it.
    """
    calls = [node for node in ast.walk(ast.parse((_PACKAGE / module).read_text("utf-8"))) if isinstance(node, ast.Call)]
    return tuple(ast.literal_eval(call.args[0]) for call in calls if ast.unparse(call.func) == f"{registry}.register")


FAMILIES = registered("models/__init__.py", "FAMILIES")
IMPORTANCES = registered("pruning/importance/__init__.py", "IMPORTANCES")
REDUCTIONS = registered("pruning/reduction/__init__.py", "REDUCTIONS")
ALIGNMENTS = registered("pruning/alignment.py", "ALIGNMENTS")
TARGETS = registered("export/export.py", "TARGETS")
DATASETS = registered("data/__init__.py", "DATASETS")
PRECISIONS: tuple[str, ...] = get_args(Training.model_fields["precision"].annotation)
REPAIRS: tuple[str, ...] = get_args(Pruning.model_fields["repair"].annotation)
BACKENDS = ("auto", *registered("kernels/__init__.py", "BACKENDS"))


def listed(names: Iterable[str]) -> str:
    """ "a, b or c"."""
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


def one_of(names: tuple[str, ...], more: Callable[[], tuple[str, ...]] = tuple) -> Callable[[str], str]:
    """Takes one of `names`, or of those that `more` finds."""

    def parse(text: str) -> str:
        if text in names:
            return text
        known = (*names, *more())
        if text in known:
            return text
        close = difflib.get_close_matches(text, known, n=1)
        guess = f"; did you mean {close[0]!r}?" if close else ""
        raise typer.BadParameter(f"{shown(text)!r} is none of {', '.join(known)}{guess}")

    return parse


def family(text: str) -> str:
    """Takes the name of a model family, one of ours or of an installed package."""
    return one_of(FAMILIES, lambda: tuple(plugin.name for plugin in family_plugins()))(text)


def number(
    low: float = -math.inf, high: float = math.inf, *, above: float = -math.inf, whole: bool = False
) -> Callable[[Any], Any]:
    """Takes a finite number from `low` to `high` that is `above` another; `whole` ones only. Defaults are numbers."""
    ends = [("above", above), ("at least", low), ("at most", high)]
    bounds = [f"{word} {bound:,g}" for word, bound in ends if math.isfinite(bound)]
    kind = " ".join(["a whole number" if whole else "a number", " and ".join(bounds)]).rstrip()

    def parse(text: Any) -> Any:
        try:
            value = int(text) if whole else float(text)
        except ValueError:
            value = math.nan
        if math.isfinite(value) and low <= value <= high and value > above:
            return value
        raise typer.BadParameter(f"must be {kind}, not {shown(str(text))!r}")

    return parse


def size(text: str) -> int:
    """Takes a size such as 5MB or 800kB, and gives bytes."""
    parts = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?) ?([kMG])B", text, flags=re.ASCII)
    found = 0 if parts is None else round(float(parts[1]) * {"k": 1e3, "M": 1e6, "G": 1e9}[parts[2]])
    if found < 1:
        raise typer.BadParameter(f"must be a size in kB, MB or GB, such as 5MB, not {shown(text)!r}")
    return found


def number_or(word: str, low: int, high: int) -> Callable[[Any], str]:
    """Takes `word`, or a whole number from `low` to `high`, and gives the text."""
    one = number(low, high, whole=True)

    def parse(text: Any) -> str:
        try:
            return word if text == word else str(one(text))
        except typer.BadParameter as error:
            raise typer.BadParameter(f"{error.message}; or {word}") from error

    return parse


def numbers(
    example: str,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: float = -math.inf,
    whole: bool = False,
    count: int | None = None,
) -> Callable[[str], str]:
    """Takes numbers separated by commas, each as `number` takes it and `count` of them, and gives the text."""
    one = number(low, high, above=above, whole=whole)

    def parse(text: str) -> str:
        parts = text.split(",")
        if count not in (None, len(parts)):
            raise typer.BadParameter(f"takes {count} numbers, such as {example}, not {shown(text)!r}")
        for part in parts:
            try:
                one(part)
            except typer.BadParameter as error:
                raise typer.BadParameter(f"each {error.message}, in a list such as {example}") from error
        return text

    return parse


def lengths(example: str, high: int) -> Callable[[str], str]:
    """Takes whole numbers from 2 to `high` in rising order, separated by commas; 4k is 4096. Gives plain numbers."""
    many = numbers(example, 2, high, whole=True)

    def parse(text: str) -> str:
        found = many(",".join(_thousands(part) for part in text.split(",")))
        values = [int(part) for part in found.split(",")]
        if len(values) < 2 or values != sorted(set(values)):
            raise typer.BadParameter(f"takes two numbers or more in rising order, such as {example}")
        return found

    return parse


def _thousands(text: str) -> str:
    number = text[:-1]
    return str(int(number) * 1024) if text[-1:] in ("k", "K") and number.isascii() and number.isdigit() else text


def setting(section: type[Section], field: str) -> Callable[[Any], Any]:
    """Takes what this field of a recipe takes."""
    info = section.model_fields[field]
    kind = Annotated.__class_getitem__((info.annotation, info))  # type: ignore[attr-defined]
    adapter: TypeAdapter[Any] = TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False))

    def parse(text: Any) -> Any:
        try:
            return adapter.validate_python(text)
        except ValidationError as error:
            ((_, words),) = explain(error, {})[:1]
            raise typer.BadParameter(words) from error

    return parse


def recipe(text: str) -> str:
    """Takes a file or the name of a shipped recipe."""
    try:
        if not text or not find_recipe(text).is_file():
            raise RecipeError("is neither a file nor the name of a shipped recipe")
    except RecipeError as error:
        raise typer.BadParameter(f"{shown(text)!r}: {error.what}") from error
    return text


def methods(text: str) -> str:
    """Takes importance/reduction/alignment, files and names of recipes, separated by commas, and gives the text."""
    for name in text.split(","):
        parts = name.split("/")
        if len(parts) == 3 and not Path(name).exists():
            for part, names in zip(parts, (IMPORTANCES, REDUCTIONS, ALIGNMENTS), strict=True):
                one_of(names)(part)
        else:
            recipe(name)
    return text
