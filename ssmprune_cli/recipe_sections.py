"""The sections of a recipe: frozen, strict values (an unknown key is an error), read without torch.

A new section is a class here, a field of `recipe.Recipe` and a line in `recipe.SECTIONS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from ssmprune_cli.validation import suggestion


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


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class ModelChoice(Section):
    """Which model the recipe was made for; it guides detection when the checkpoint leaves it open."""

    family: Name
    variant: Name | None = None

    _known = field_validator("family")(_check_name)


class Pruning(Section):
    """Where tokens are dropped, how many stay, and how.

    points     prune after this many blocks, rising; None is a quarter, half and three quarters of the depth
    keep       ratio of patch tokens kept *at each point*, 0 < keep <= 1: one number or one a point
    tokens     instead of `keep`: patch tokens that stay after each point
    alignment  "auto" is the best that is possible, see `pruning.compress.choose_alignment`. YAML's bare
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


class CalibrationPlan(Section):
    """How many images are taken, which ones (by `seed`), and how many run at once."""

    images: PositiveInt = 64
    seed: Seed = 0
    batch_size: PositiveInt = 16
