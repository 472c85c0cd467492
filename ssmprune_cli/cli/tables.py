"""How a command's facts look to a person."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table


def facts_table(facts: Mapping[str, Any]) -> Table:
    """Two columns, one row a fact; a fact that is a mapping gives one row an entry."""
    table = Table(show_header=False)
    table.add_column("", no_wrap=True)
    table.add_column("", overflow="fold")
    for key, value in facts.items():
        name = key.replace("_", " ")
        if isinstance(value, Mapping):
            for entry, detail in value.items():
                table.add_row(f"{name}: {entry}", _text(detail))
        else:
            table.add_row(name, _text(value))
    return table


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value)) or "none"
    return "-" if value is None else str(value)
