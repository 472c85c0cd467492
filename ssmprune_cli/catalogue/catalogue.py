"""The published checkpoints in `checkpoints.yaml`, read without torch. Nothing here downloads anything."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field, TypeAdapter

from ssmprune_cli.errors import UsageError
from ssmprune_cli.recipe import Section, suggestion

_FILE = Path(__file__).with_name("checkpoints.yaml")
Name = Annotated[str, Field(min_length=1)]


class Entry(Section):
    """One checkpoint; the head of `checkpoints.yaml` says what each field means. None for what nobody states."""

    name: Name
    family: Name
    variant: Name
    dataset: Name
    published: dict[str, float] = Field(default_factory=dict)
    file: Name
    address: Name
    hub: Name | None = None
    size: Name | None = None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    licence: Name | None = None
    parameters: int | None = None
    multiply_adds: float | None = None
    source: Name
    note: Name | None = None

    @property
    def checkpoint(self) -> str:
        """What to give a command for it: an address of the hub, or the file's name once it is downloaded."""
        return f"hf://{self.hub}" if self.hub else self.file


@functools.cache
def entries() -> tuple[Entry, ...]:
    """All of them, family by family."""
    return TypeAdapter(tuple[Entry, ...]).validate_python(
        tuple(yaml.safe_load(_FILE.read_text(encoding="utf-8"))), strict=True
    )


def find_entry(name: str) -> Entry:
    """The one of this name or file name. Raises UsageError with the closest name."""
    known = {each.name: each for each in entries()}
    found = known.get(name) or next((each for each in entries() if each.file == name), None)
    if found is None:
        raise UsageError(
            f"there is no published checkpoint of this name; {suggestion(name, known)}",
            where=name,
            hint="See `ssmprune models list`.",
        )
    return found
